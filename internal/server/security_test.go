package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/protos/expander"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

// with returns TLS of a client that trusts a and shows a certificate of by.
func (a *authority) with(t testing.TB, by *authority, change ...func(*x509.Certificate)) *tls.Config {
	t.Helper()
	pair, err := tls.X509KeyPair(by.issue(t, change...))
	must(t, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.pem)
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}
}

// TestBadCertificates: nobody scales with a certificate that the authority did
// not sign for a client, now; and no client talks to a server of another name.
func TestBadCertificates(t *testing.T) {
	fleet := newFakeFleet(1, 2).show()
	r := serve(t, fleet)
	address := r.config.Listener.Addr().String()
	twin := newAuthority(t) // another key under the authority's name
	leaf, key := r.authority.issue(t)
	pair, err := tls.X509KeyPair(leaf, key)
	must(t, err)
	signedByLeaf := &authority{pem: r.authority.pem}
	signedByLeaf.cert, err = x509.ParseCertificate(pair.Certificate[0])
	must(t, err)
	signedByLeaf.key = pair.PrivateKey.(*ecdsa.PrivateKey)
	otherName := r.authority.with(t, r.authority)
	otherName.ServerName = "hearth.example"
	for _, tc := range []struct {
		name  string
		creds *tls.Config
		want  string // in what the client says; a refusal may come as the end of the connection
	}{
		{"that ended a minute ago", r.authority.with(t, r.authority, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), ""},
		{"that begins in a minute", r.authority.with(t, r.authority, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), ""},
		{"for servers alone", r.authority.with(t, r.authority, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), ""},
		{"of an authority with the same name", r.authority.with(t, twin), ""},
		{"signed by a leaf", r.authority.with(t, signedByLeaf), ""},
		{"asking for a server of another name", otherName, "hearth.example"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			client := pb.NewCloudProviderClient(dial(t, address, credentials.NewTLS(tc.creds)))
			_, err := client.NodeGroupIncreaseSize(brief(t), &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 1})
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want Unavailable … %s …", err, tc.want)
			}
		})
	}
	if v := fleet.View().Group("group-0"); v.Target != 2 {
		t.Errorf("the target is %d", v.Target)
	}
	if all, _ := fleet.forgotten(); all != 0 {
		t.Errorf("%d connections were begun", all)
	}
	if strings.Contains(r.log.String(), "method") {
		t.Errorf("a request was handled:\n%s", r.log)
	}
}

// TestResumptionEndsWithItsAuthority: who connected under an authority that was
// replaced since cannot resume that session.
func TestResumptionEndsWithItsAuthority(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	address := r.config.Listener.Addr().String()
	config := r.authority.with(t, r.authority)
	config.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	config.NextProtos = []string{"h2"}
	connect := func() (resumed bool, err error) {
		conn, err := (&tls.Dialer{Config: config}).DialContext(brief(t), "tcp", address)
		if err != nil {
			return false, err
		}
		defer conn.Close()
		must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
		// With TLS 1.3 the server's refusal comes with the first answer, as tickets do.
		_, err = conn.Read(make([]byte, 1))
		return conn.(*tls.Conn).ConnectionState().DidResume, err
	}
	if _, err := connect(); err != nil {
		t.Fatal(err)
	}
	if resumed, err := connect(); err != nil || !resumed {
		t.Fatalf("under the same authority: resumed %v, %v", resumed, err) // else the rest shows nothing
	}
	next := newAuthority(t)
	config.RootCAs.AppendCertsFromPEM(next.pem)
	writeTLS(t, r.dir, next, next)
	if _, err := connect(); err == nil {
		t.Error("let in after the authority was replaced")
	}
}

// flood is a ranker or fleet that counts who is inside, and keeps them there.
type flood struct {
	inside, most atomic.Int64
	leave        chan struct{}
}

func (f *flood) enter() {
	n := f.inside.Add(1)
	for {
		most := f.most.Load()
		if n <= most || f.most.CompareAndSwap(most, n) {
			break
		}
	}
	<-f.leave
	f.inside.Add(-1)
}

func waitUntil(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) { // polls a condition
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// TestExpanderFlood: of many who offer at once a few are ranked; the others are
// told so at once, and nothing of what they sent is kept. Later ones are served.
func TestExpanderFlood(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	f := &flood{leave: make(chan struct{})}
	fleet.best = func([]ExpanderOption) []model.GroupID { f.enter(); return []model.GroupID{"a"} }
	r := serve(t, fleet)
	var clients []expander.ExpanderClient
	for range maxExpanderConnections {
		clients = append(clients, r.expanderClient(t))
	}
	var inside sync.WaitGroup
	for _, c := range clients[:offersAtOnce] {
		inside.Go(func() {
			if _, err := c.BestOptions(brief(t), offer("a", "b")); err != nil {
				t.Errorf("one of the first: %v", err)
			}
		})
	}
	waitUntil(t, "the first", func() bool { return f.inside.Load() == offersAtOnce })
	big := offer("a", "b")
	big.Options[0].PodBytes = [][]byte{make([]byte, 1<<20)}
	for range 4 {
		for _, c := range clients[offersAtOnce:] {
			if _, err := c.BestOptions(brief(t), big); status.Code(err) != codes.ResourceExhausted {
				t.Fatalf("one of the others: got %v, want ResourceExhausted", err)
			}
		}
	}
	if f.most.Load() > offersAtOnce {
		t.Errorf("%d were ranked at once", f.most.Load())
	}
	close(f.leave)
	inside.Wait()
	waitUntil(t, "a later one to be served", func() bool {
		_, err := clients[0].BestOptions(brief(t), offer("a", "b"))
		return err == nil
	})
}

// TestExpanderTrickle: an offer that never comes to its end holds its place for
// a few seconds only.
func TestExpanderTrickle(t *testing.T) {
	if testing.Short() {
		t.Skip("takes as long as an offer may")
	}
	r := serve(t, newFakeFleet(1, 1).show())
	conn := dial(t, r.config.ExpanderListener.Addr().String(), r.authority.client(t, nil))
	var streams []grpc.ClientStream
	for range offersAtOnce {
		s, err := conn.NewStream(brief(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, expander.Expander_BestOptions_FullMethodName)
		must(t, err)
		streams = append(streams, s) // and no message
	}
	client := r.expanderClient(t)
	waitUntil(t, "both places to be taken", func() bool {
		_, err := client.BestOptions(brief(t), offer("a", "b"))
		return status.Code(err) == codes.ResourceExhausted
	})
	for _, s := range streams {
		if err := s.RecvMsg(&expander.BestOptionsResponse{}); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("one that sent nothing was answered: %v", err)
		}
	}
	waitUntil(t, "others to be served again", func() bool {
		_, err := client.BestOptions(brief(t), offer("a", "b"))
		return err == nil
	})
}

// TestExpanderConnections: more connections than there are places wait; one that
// ends makes room.
func TestExpanderConnections(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	address := r.config.ExpanderListener.Addr().String()
	var held []net.Conn
	for range maxExpanderConnections {
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(r.authority.pem)
		conn, err := (&tls.Dialer{Config: &tls.Config{RootCAs: roots, NextProtos: []string{"h2"}}}).DialContext(brief(t), "tcp", address)
		must(t, err)
		defer conn.Close()
		held = append(held, conn)
	}
	conn := dial(t, address, r.authority.client(t, nil))
	conn.Connect()
	client := expander.NewExpanderClient(conn)
	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := client.BestOptions(short, offer("a", "b"), grpc.WaitForReady(true)); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("with every place taken: got %v, want DeadlineExceeded", err)
	}
	must(t, held[0].Close())
	if _, err := client.BestOptions(brief(t), offer("a", "b"), grpc.WaitForReady(true)); err != nil {
		t.Errorf("after one went: %v", err)
	}
}

// TestCloudProviderFlood: one client's thousand writes at once are handled some
// at a time, also when it takes each back at once; then all is as before.
func TestCloudProviderFlood(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	f := &flood{leave: make(chan struct{})}
	fleet.before = func(_ context.Context, operation string) error {
		if operation == "IncreaseSize" {
			f.enter() // whether or not its client waits still
		}
		return nil
	}
	r := serve(t, fleet)
	client := r.cloudClient(t)
	ctx, takeBack := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 1000 {
		all.Go(func() {
			_, _ = client.NodeGroupIncreaseSize(ctx, &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 100_000})
		})
	}
	waitUntil(t, "as many as may", func() bool { return f.inside.Load() == maxStreams })
	takeBack()
	all.Wait()
	for range 1000 { // those that were taken back count until their handlers end
		gone, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, _ = client.NodeGroupIncreaseSize(gone, &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 100_000})
		cancel()
	}
	if most := f.most.Load(); most > maxStreams {
		t.Errorf("%d were handled at once", most)
	}
	close(f.leave)
	waitUntil(t, "the last", func() bool { return f.inside.Load() == 0 })
	if _, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestStrangersHoldNobodyUp: connections that show no certificate are many, and
// cluster-autoscaler is served all the same.
func TestStrangersHoldNobodyUp(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	address := r.config.Listener.Addr().String()
	for range maxConnections - 1 {
		conn, err := (&net.Dialer{}).DialContext(brief(t), "tcp", address)
		must(t, err)
		defer conn.Close()
	}
	if _, err := r.cloudClient(t).NodeGroups(brief(t), &pb.NodeGroupsRequest{}); err != nil {
		t.Error(err)
	}
}

// TestLongHeaders: what comes before a message is bounded too.
func TestLongHeaders(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	for name, conn := range map[string]*grpc.ClientConn{
		"cloud": r.cloudConn(t), "expander": dial(t, r.config.ExpanderListener.Addr().String(), r.authority.client(t, nil)),
	} {
		health := healthpb.NewHealthClient(conn)
		long := metadata.AppendToOutgoingContext(brief(t), "padding", strings.Repeat("x", 2*maxHeaders))
		if _, err := health.Check(long, &healthpb.HealthCheckRequest{}); err == nil {
			t.Errorf("%s: %d bytes of headers were taken", name, 2*maxHeaders)
		}
		if _, err := health.Check(brief(t), &healthpb.HealthCheckRequest{}); err != nil {
			t.Errorf("%s: afterwards: %v", name, err)
		}
		if state := conn.GetState(); state != connectivity.Ready {
			t.Errorf("%s: the connection is %s", name, state)
		}
	}
}
