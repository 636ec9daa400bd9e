package placement

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

const (
	fleetNodes = 5000
	fleetKeys  = 300
)

// fleet is a desk that knows 5,000 nodes, each warm for twenty of 300 keys, a
// third of them busy.
func fleet(t testing.TB) *desk {
	d := newDesk(t)
	r := mathrand.New(mathrand.NewPCG(1, 2))
	for i := range fleetNodes {
		keys := make([]model.CacheKey, model.MaxWarmLabels)
		for j := range keys {
			keys[j] = model.CacheKey(fmt.Sprintf("acme/repo-%d", r.IntN(fleetKeys)))
		}
		name := fmt.Sprintf("ip-10-%d-%d.internal", i/250, i%250)
		d.node(name, keys...)
		if i%3 == 0 {
			d.job(name, string(keys[0]))
		}
	}
	return d
}

// idle is what a webhook costs that reads the request and decides nothing.
func idle(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	_, _ = io.WriteString(w, `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{"uid":"u-1","allowed":true}}`)
}

// reviews are requests for pods of about 6 kB, as ARC's are.
func reviews(t testing.TB) (bodies [][]byte) {
	for i := range fleetKeys {
		pod := runner(fmt.Sprintf("acme/repo-%d", i))
		pod.Annotations["notes"] = string(bytes.Repeat([]byte("n"), 5000))
		bodies = append(bodies, review(t, pod))
	}
	return bodies
}

func BenchmarkReview(b *testing.B) {
	d := fleet(b)
	bodies := reviews(b)
	for _, handler := range []struct {
		name string
		http.Handler
	}{{"no-op", http.HandlerFunc(idle)}, {"placement", d}} {
		b.Run(handler.name, func(b *testing.B) {
			i := 0
			for b.Loop() {
				i++
				handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodPost, "/placement", bytes.NewReader(bodies[i%len(bodies)])))
			}
		})
	}
}

// A key that every node is warm for is the dearest.
func BenchmarkKeyOfAllNodes(b *testing.B) {
	d := newDesk(b)
	for i := range fleetNodes {
		d.node(fmt.Sprint(i), "a")
	}
	body := review(b, runner("a"))
	for b.Loop() {
		d.post(body)
	}
}

// BenchmarkAddedLatency prints what the webhook adds to the creation of a pod at
// 200 pods/s with 5,000 nodes and as many changes of pods, over a server that
// decides nothing. The goal is 10 ms for 99 of 100.
func BenchmarkAddedLatency(b *testing.B) {
	d := fleet(b)
	pods := reviews(b)
	for b.Loop() {
		none := measure(b, http.HandlerFunc(idle), pods, func(int) {})
		ours := measure(b, d, pods, func(i int) {
			d.job(fmt.Sprintf("ip-10-%d-%d.internal", i%20, i%250), "acme/repo-1")()
		})
		b.ReportMetric(float64(ours.p50)/float64(none.p50), "p50-ratio")
		b.ReportMetric(float64(ours.p99)/float64(none.p99), "p99-ratio")
		b.ReportMetric(float64((ours.p99 - none.p99).Microseconds()), "p99-added-µs")
	}
}

type latencies struct{ p50, p99 time.Duration }

// measure posts 200 reviews a second over TLS, as an API server does, each at
// its time whether those before are answered or not.
func measure(t testing.TB, handler http.Handler, bodies [][]byte, meanwhile func(int)) latencies {
	t.Helper()
	url, client := serve(t, handler)
	const rate, requests = 200, 400
	all := make([]time.Duration, requests)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range requests {
		due := begin.Add(time.Duration(i) * time.Second / rate)
		time.Sleep(time.Until(due)) // the load is the test
		wg.Go(func() {
			resp, err := client.Post(url, "application/json", bytes.NewReader(bodies[i%len(bodies)]))
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("answered %s", resp.Status)
			}
			all[i] = time.Since(due)
		})
		meanwhile(i)
	}
	wg.Wait()
	slices.Sort(all)
	return latencies{all[requests/2], all[requests*99/100]}
}

// serve runs a Server on loopback until the test ends.
func serve(t testing.TB, handler http.Handler) (url string, client *http.Client) {
	t.Helper()
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	pair, pool := certificate(t)
	server, err := NewServer(ServerConfig{
		Listener: listener, Handler: handler, Logger: slog.New(slog.DiscardHandler),
		Certificate: func() (*tls.Certificate, error) { return pair, nil },
	})
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, MaxIdleConnsPerHost: 100}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serving ended with %v", err)
		}
	})
	return "https://" + listener.Addr().String() + "/placement", &http.Client{Transport: transport, Timeout: 5 * time.Second}
}

// certificate is one for loopback that signs itself.
func certificate(t testing.TB) (*tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: cert}, pool
}

func TestServerServesOnlyPlacement(t *testing.T) {
	d := newDesk(t)
	d.node("n1", "a")
	url, client := serve(t, d)
	for _, tt := range []struct {
		method, path string
		want         int
	}{
		{http.MethodPost, "", http.StatusOK}, {http.MethodGet, "", http.StatusMethodNotAllowed}, {http.MethodPost, "/x", http.StatusNotFound},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tt.method, url+tt.path, bytes.NewReader(review(t, runner("a"))))
		must(t, err)
		resp, err := client.Do(req)
		must(t, err)
		_ = resp.Body.Close()
		if resp.StatusCode != tt.want {
			t.Errorf("%s %s: %s", tt.method, tt.path, resp.Status)
		}
	}
}
