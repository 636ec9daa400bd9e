package server

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/hearth-ci/hearth/protos/expander"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{cert: cert, key: key, pem: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func serial(t testing.TB) *big.Int {
	t.Helper()
	n, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	return n
}

// issue returns a certificate for 127.0.0.1 and its key, as PEM; change may spoil
// the certificate before it is signed.
func (a *authority) issue(t testing.TB, change ...func(*x509.Certificate)) (certPEM, keyPEM []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: serial(t), Subject: pkix.Name{CommonName: "test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, f := range change {
		f(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	must(t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

// client is how a client that trusts a dials; with is the authority of its own
// certificate, nil for a client that has none.
func (a *authority) client(t testing.TB, with *authority) credentials.TransportCredentials {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.pem)
	config := &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	if with != nil {
		pair, err := tls.X509KeyPair(with.issue(t))
		must(t, err)
		config.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(config)
}

// writeTLS puts a server's files into dir, each replaced at once.
func writeTLS(t testing.TB, dir string, server, clients *authority) TLS {
	t.Helper()
	cert, key := server.issue(t)
	files := TLS{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"), ClientCAFile: filepath.Join(dir, "ca.crt")}
	for path, content := range map[string][]byte{files.CertFile: cert, files.KeyFile: key, files.ClientCAFile: clients.pem} {
		must(t, os.WriteFile(path+".new", content, 0o600))
		must(t, os.Rename(path+".new", path))
	}
	return files
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// logBuffer collects log lines.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// running is a server that serves over mutual TLS on loopback.
type running struct {
	*Server
	fleet     *fakeFleet
	registry  *prometheus.Registry
	log       *logBuffer
	dir       string // of the TLS files
	authority *authority
	cancel    context.CancelFunc
	done      chan error // what Run returned
}

func start(t testing.TB, fleet *fakeFleet, level slog.Level) *running {
	t.Helper()
	r := &running{fleet: fleet, registry: prometheus.NewPedanticRegistry(), log: &logBuffer{}, dir: t.TempDir(), authority: newAuthority(t), done: make(chan error, 1)}
	var err error
	r.Server, err = New(Config{
		Reader: fleet, Writer: fleet, Ranker: fleet, Registerer: r.registry,
		Logger:   slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: level})),
		TLS:      writeTLS(t, r.dir, r.authority, r.authority),
		Listener: listen(t), ExpanderListener: listen(t),
	})
	must(t, err)
	return r
}

// run begins to serve; the end of the test stops it.
func (r *running) run(t testing.TB) *running {
	t.Helper()
	var ctx context.Context
	ctx, r.cancel = context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.done <- r.Run(ctx)
	}()
	t.Cleanup(func() {
		r.cancel()
		<-ended
	})
	return r
}

func serve(t testing.TB, fleet *fakeFleet) *running {
	t.Helper()
	return start(t, fleet, slog.LevelDebug).run(t)
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t testing.TB, address string, creds credentials.TransportCredentials, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, append(options, grpc.WithTransportCredentials(creds))...)
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// cloudConn is a new connection as CA makes it.
func (r *running) cloudConn(t testing.TB, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	return dial(t, r.config.Listener.Addr().String(), r.authority.client(t, r.authority), options...)
}

func (r *running) cloudClient(t testing.TB) externalgrpc.CloudProviderClient {
	t.Helper()
	return externalgrpc.NewCloudProviderClient(r.cloudConn(t))
}

// expanderClient dials as CA's expander does: without a certificate.
func (r *running) expanderClient(t testing.TB) expander.ExpanderClient {
	t.Helper()
	return expander.NewExpanderClient(dial(t, r.config.ExpanderListener.Addr().String(), r.authority.client(t, nil)))
}

// plaintext serves without TLS on loopback.
func plaintext(t testing.TB, fleet *fakeFleet) (*Server, *grpc.ClientConn) {
	t.Helper()
	s, err := New(Config{
		Reader: fleet, Writer: fleet, Ranker: fleet, Registerer: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler),
		Listener: listen(t), ExpanderListener: listen(t),
	})
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s, dial(t, s.config.Listener.Addr().String(), insecure.NewCredentials())
}

// brief bounds a test's calls.
func brief(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}
