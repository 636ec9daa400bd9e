package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
	pb "github.com/hearth-ci/hearth/protos/externalgrpc"
)

func TestNewNeedsItsParts(t *testing.T) {
	_, err := New(Config{TLS: TLS{CertFile: "x"}})
	if err == nil {
		t.Fatal("an empty config was taken")
	}
	for _, part := range []string{"Reader", "Writer", "Ranker", "Logger", "Registerer", "Listener", "ExpanderListener", "want all of CertFile"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %s", err, part)
		}
	}
}

func TestNewFindsBadCertificates(t *testing.T) {
	fleet, a, b := newFakeFleet(0, 0), newAuthority(t), newAuthority(t)
	for _, tc := range []struct {
		name  string
		spoil func(TLS) error
		want  string
	}{
		{"missing", func(files TLS) error { return os.Remove(files.KeyFile) }, "no such file"},
		{"no certificate", func(files TLS) error { return os.WriteFile(files.CertFile, []byte("x"), 0o600) }, "TLS certificate"},
		{"another's key", func(files TLS) error {
			_, key := b.issue(t)
			return os.WriteFile(files.KeyFile, key, 0o600)
		}, "does not match"},
		{"no authorities", func(files TLS) error { return os.WriteFile(files.ClientCAFile, nil, 0o600) }, "want PEM certificates"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			files := writeTLS(t, t.TempDir(), a, a)
			must(t, tc.spoil(files))
			_, err := New(Config{
				Reader: fleet, Writer: fleet, Ranker: fleet, Registerer: prometheus.NewRegistry(), Logger: slog.New(slog.DiscardHandler),
				TLS: files, Listener: listen(t), ExpanderListener: listen(t),
			})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want … %s …", err, tc.want)
			}
		})
	}
}

// TestWhoIsLetIn: CloudProvider demands a certificate of the right authority,
// Expander none.
func TestWhoIsLetIn(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	stranger := newAuthority(t)
	cloud, expander := r.config.Listener.Addr().String(), r.config.ExpanderListener.Addr().String()
	old := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	for _, tc := range []struct {
		name, address string
		creds         credentials.TransportCredentials
		want          codes.Code
	}{
		{"with a certificate", cloud, r.authority.client(t, r.authority), codes.OK},
		{"without a certificate", cloud, r.authority.client(t, nil), codes.Unavailable},
		{"with a stranger's certificate", cloud, r.authority.client(t, stranger), codes.Unavailable},
		{"a client that does not trust us", cloud, stranger.client(t, r.authority), codes.Unavailable},
		{"without TLS", cloud, insecure.NewCredentials(), codes.Unavailable},
		{"with old TLS", cloud, credentials.NewTLS(old), codes.Unavailable},
		{"expander without a certificate", expander, r.authority.client(t, nil), codes.OK},
		{"expander without TLS", expander, insecure.NewCredentials(), codes.Unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := healthpb.NewHealthClient(dial(t, tc.address, tc.creds)).Check(brief(t), &healthpb.HealthCheckRequest{})
			if status.Code(err) != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
	t.Run("each listener has its own service", func(t *testing.T) {
		conn := dial(t, expander, r.authority.client(t, nil))
		if _, err := pb.NewCloudProviderClient(conn).NodeGroups(brief(t), &pb.NodeGroupsRequest{}); status.Code(err) != codes.Unimplemented {
			t.Errorf("CloudProvider at the expander's: got %v, want Unimplemented", err)
		}
	})
}

// TestCertificatesRotateUnderLoad replaces every file, authorities too, while
// requests are made; none fails, and new connections follow.
func TestCertificatesRotateUnderLoad(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	address := r.config.Listener.Addr().String()
	before := r.authority
	check := func(creds credentials.TransportCredentials) error {
		_, err := pb.NewCloudProviderClient(dial(t, address, creds)).NodeGroups(brief(t), &pb.NodeGroupsRequest{})
		return err
	}
	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	counts := make(chan int, 4)
	for range 4 {
		client := r.cloudClient(t)
		_, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{}) // connects
		must(t, err)
		load.Go(func() {
			n := 0
			for ; ctx.Err() == nil; n++ {
				if _, err := client.NodeGroups(t.Context(), &pb.NodeGroupsRequest{}); err != nil {
					t.Errorf("under load: %v", err)
					break
				}
			}
			counts <- n
		})
	}
	for range 3 {
		after := newAuthority(t)
		writeTLS(t, r.dir, after, after)
		must(t, check(after.client(t, after)))
		if err := check(after.client(t, before)); status.Code(err) != codes.Unavailable {
			t.Errorf("a client of the authority before: got %v, want Unavailable", err)
		}
		before = after
	}
	// What cannot be used is reported once and changes nothing.
	must(t, os.WriteFile(r.config.TLS.CertFile, []byte("half a file"), 0o600))
	for range 3 {
		must(t, check(before.client(t, before)))
	}
	if n := strings.Count(r.log.String(), "TLS files cannot be used"); n != 1 {
		t.Errorf("reported %d times, want once", n)
	}
	last := newAuthority(t)
	writeTLS(t, r.dir, last, last)
	must(t, check(last.client(t, last)))

	stop()
	load.Wait()
	for range 4 {
		if n := <-counts; n == 0 {
			t.Error("there was no load")
		}
	}
}

// TestNewConnections: CA's memory is in doubt at each new connection, until it
// was dealt with once.
func TestNewConnections(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	r := serve(t, fleet)
	forgets := func(want int) {
		t.Helper()
		if n, _ := fleet.forgotten(); n != want {
			t.Errorf("forgot %d times, want %d", n, want)
		}
	}
	first := r.cloudConn(t)
	_, err := healthpb.NewHealthClient(first).Check(brief(t), &healthpb.HealthCheckRequest{})
	must(t, err)
	forgets(0) // a probe is not CA
	for range 3 {
		_, err = pb.NewCloudProviderClient(first).GPULabel(brief(t), &pb.GPULabelRequest{})
		must(t, err)
		forgets(1)
	}
	_, err = r.cloudClient(t).Refresh(brief(t), &pb.RefreshRequest{})
	must(t, err)
	forgets(2)

	// As long as it fails, the connection is not served.
	fleet.fails("Forget", errors.New("no"))
	third := r.cloudClient(t)
	for range 2 {
		if _, err := third.NodeGroups(brief(t), &pb.NodeGroupsRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want Unavailable", err)
		}
	}
	forgets(2)
	fleet.fails("", nil)
	_, err = third.NodeGroups(brief(t), &pb.NodeGroupsRequest{})
	must(t, err)
	forgets(3)
}

// TestOneForgetPerConnection: the others wait for it, or give up.
func TestOneForgetPerConnection(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	entered, leave := make(chan struct{}), make(chan struct{})
	fleet.before = func(_ context.Context, operation string) error {
		if operation == "Forget" {
			entered <- struct{}{}
			<-leave
		}
		return nil
	}
	client := serve(t, fleet).cloudClient(t)
	const callers = 8
	errs := make(chan error, callers)
	for range callers {
		go func() {
			_, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{})
			errs <- err
		}()
	}
	<-entered
	impatient, cancel := context.WithCancel(brief(t))
	gaveUp := make(chan error, 1)
	go func() {
		_, err := client.NodeGroups(impatient, &pb.NodeGroupsRequest{})
		gaveUp <- err
	}()
	cancel()
	if err := <-gaveUp; status.Code(err) != codes.Canceled {
		t.Errorf("who gave up: got %v, want Canceled", err)
	}
	select {
	case err := <-errs:
		t.Errorf("answered before the fleet has forgotten: %v", err)
	default:
	}
	close(leave)
	for range callers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n, _ := fleet.forgotten(); n != 1 {
		t.Errorf("forgot %d times, want once", n)
	}
}

// TestTooLate: an IncreaseSize that ended before it was answered did not
// happen for CA, whatever was recorded.
func TestTooLate(t *testing.T) {
	for _, tc := range []struct {
		name string
		ends func(context.Context) (context.Context, context.CancelFunc)
		want codes.Code
	}{
		{"canceled", context.WithCancel, codes.Canceled},
		{"timed out", func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 50*time.Millisecond)
		}, codes.DeadlineExceeded},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fleet := newFakeFleet(2, 1).show()
			entered := make(chan struct{}, 1)
			fleet.hangs("IncreaseSize", entered)
			r := serve(t, fleet)
			client := r.cloudClient(t)
			ctx, cancel := tc.ends(brief(t))
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := client.NodeGroupIncreaseSize(ctx, &pb.NodeGroupIncreaseSizeRequest{Id: "group-1", Delta: 1})
				done <- err
			}()
			<-entered
			if tc.want == codes.Canceled {
				cancel()
			}
			if err := <-done; status.Code(err) != tc.want {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			r.cancel() // the handler outlives its client; the end of the server waits for it
			must(t, <-r.done)
			if _, groups := fleet.forgotten(); !slices.Equal(groups, []model.GroupID{"group-1"}) {
				t.Errorf("forgot %v, want group-1", groups)
			}
			if !slices.Equal(fleet.wasAlive, []bool{true}) {
				t.Error("forgot under the context that had ended, or under one without a deadline")
			}
		})
	}
	t.Run("in time", func(t *testing.T) {
		fleet := newFakeFleet(1, 1).show()
		client := serve(t, fleet).cloudClient(t)
		_, err := client.NodeGroupIncreaseSize(brief(t), &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 1})
		must(t, err)
		if _, groups := fleet.forgotten(); len(groups) != 0 {
			t.Errorf("forgot %v", groups)
		}
	})
}

// TestPanics: a panic ends the request, not the process; it is measured,
// logged with its stack, and not shown.
func TestPanics(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	fleet.before = func(_ context.Context, operation string) error {
		if operation == "IncreaseSize" {
			panic("secret 42")
		}
		return nil
	}
	fleet.best = func([]ExpanderOption) []model.GroupID { panic("secret 43") }
	r := serve(t, fleet)
	client := r.cloudClient(t)
	_, err := client.NodeGroupIncreaseSize(brief(t), &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 1})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v, want Internal", err)
	}
	_, err = r.expanderClient(t).BestOptions(brief(t), offer("group-0"))
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
		t.Errorf("expander: got %v, want Internal", err)
	}
	_, err = client.NodeGroups(brief(t), &pb.NodeGroupsRequest{})
	must(t, err)
	log := r.log.String()
	for _, want := range []string{"secret 42", "secret 43", "fake_test.go"} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in the log", want)
		}
	}
	must(t, testutil.GatherAndCompare(r.registry, strings.NewReader(`
# HELP hearth_grpc_panics_total Requests that ended in a panic and were answered with Internal.
# TYPE hearth_grpc_panics_total counter
hearth_grpc_panics_total 2
`), "hearth_grpc_panics_total"))
}

func TestRequestsAreMeasured(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	client := r.cloudClient(t)
	for _, id := range []string{"group-0", "group-0", "none"} {
		_, _ = client.NodeGroupTargetSize(brief(t), &pb.NodeGroupTargetSizeRequest{Id: id})
	}
	r.cancel() // a request is counted after its answer has left
	must(t, <-r.done)
	families, err := r.registry.Gather()
	must(t, err)
	counts := map[string]float64{}
	for _, f := range families {
		if f.GetName() != "grpc_server_handled_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["grpc_method"] == "NodeGroupTargetSize" && m.GetCounter().GetValue() > 0 {
				counts[labels["grpc_code"]] = m.GetCounter().GetValue()
			}
		}
	}
	if diff := cmp.Diff(map[string]float64{"OK": 2, "NotFound": 1}, counts); diff != "" {
		t.Error(diff)
	}
	problems, err := testutil.GatherAndLint(r.registry, "hearth_grpc_panics_total")
	must(t, err)
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestRequestsAreLogged(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	info := start(t, fleet, slog.LevelInfo).run(t)
	client := info.cloudClient(t)
	_, err := client.NodeGroups(brief(t), &pb.NodeGroupsRequest{})
	must(t, err)
	_, _ = client.PricingPodPrice(brief(t), &pb.PricingPodPriceRequest{})
	_, err = client.NodeGroupIncreaseSize(brief(t), &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 1})
	must(t, err)
	_, err = client.NodeGroupDeleteNodes(brief(t), &pb.NodeGroupDeleteNodesRequest{Id: "group-0", Nodes: []*pb.ExternalGrpcNode{node(instance(0, 0))}})
	must(t, err)
	_, _ = client.NodeGroupNodes(brief(t), &pb.NodeGroupNodesRequest{Id: "none"})
	info.cancel()
	must(t, <-info.done)
	log := info.log.String()
	for _, want := range []string{
		"NodeGroupIncreaseSize code=OK", "delta=1 nodegroup=group-0",
		"NodeGroupDeleteNodes code=OK", "nodes=1 first=[kwok://group-0/i-00000000000000000] nodegroup=group-0",
		"NodeGroupNodes code=NotFound", "nodegroup=none",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in\n%s", want, log)
		}
	}
	for _, not := range []string{"CloudProvider/NodeGroups ", "PricingPodPrice"} {
		if strings.Contains(log, not) {
			t.Errorf("%s at level info in\n%s", not, log)
		}
	}

	debug := serve(t, newFakeFleet(1, 1).show())
	_, err = debug.cloudClient(t).NodeGroups(brief(t), &pb.NodeGroupsRequest{})
	must(t, err)
	debug.cancel()
	must(t, <-debug.done)
	if !strings.Contains(debug.log.String(), "CloudProvider/NodeGroups ") {
		t.Errorf("no read at level debug in\n%s", debug.log.String())
	}
}

// TestHealth: NOT_SERVING until told otherwise, for everything at once, and
// when the server stops.
func TestHealth(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1).show())
	client := healthpb.NewHealthClient(r.cloudConn(t))
	check := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, service := range []string{"", "clusterautoscaler.cloudprovider.v1.externalgrpc.CloudProvider", "grpcplugin.Expander"} {
			resp, err := client.Check(brief(t), &healthpb.HealthCheckRequest{Service: service})
			must(t, err)
			if resp.GetStatus() != want {
				t.Errorf("%q: got %s, want %s", service, resp.GetStatus(), want)
			}
		}
	}
	watch, err := client.Watch(brief(t), &healthpb.HealthCheckRequest{})
	must(t, err)
	next := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		resp, err := watch.Recv()
		must(t, err)
		if resp.GetStatus() != want {
			t.Errorf("watch: got %s, want %s", resp.GetStatus(), want)
		}
	}
	check(healthpb.HealthCheckResponse_NOT_SERVING)
	next(healthpb.HealthCheckResponse_NOT_SERVING)
	r.SetServing(true)
	next(healthpb.HealthCheckResponse_SERVING)
	check(healthpb.HealthCheckResponse_SERVING)
	r.SetServing(false)
	next(healthpb.HealthCheckResponse_NOT_SERVING)
	check(healthpb.HealthCheckResponse_NOT_SERVING)
	r.SetServing(true)
	next(healthpb.HealthCheckResponse_SERVING)
	r.cancel() // which waits for the watch until the connection is closed
	next(healthpb.HealthCheckResponse_NOT_SERVING)
}

func TestReflection(t *testing.T) {
	r := serve(t, newFakeFleet(1, 1))
	for _, tc := range []struct {
		conn *grpc.ClientConn
		want string
	}{
		{r.cloudConn(t), "clusterautoscaler.cloudprovider.v1.externalgrpc.CloudProvider"},
		{dial(t, r.config.ExpanderListener.Addr().String(), r.authority.client(t, nil)), "grpcplugin.Expander"},
	} {
		stream, err := reflectionpb.NewServerReflectionClient(tc.conn).ServerReflectionInfo(brief(t))
		must(t, err)
		must(t, stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}))
		resp, err := stream.Recv()
		must(t, err)
		var names []string
		for _, s := range resp.GetListServicesResponse().GetService() {
			names = append(names, s.GetName())
		}
		if !slices.Contains(names, tc.want) || !slices.Contains(names, "grpc.health.v1.Health") {
			t.Errorf("got %v, want %s and health among them", names, tc.want)
		}
		must(t, stream.CloseSend())
	}
}

// TestStopIsGraceful: requests under way are answered, and Run returns nil.
func TestStopIsGraceful(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	entered, leave := make(chan struct{}), make(chan struct{})
	fleet.before = func(_ context.Context, operation string) error {
		if operation == "IncreaseSize" {
			close(entered)
			<-leave
		}
		return nil
	}
	r := serve(t, fleet)
	client := r.cloudClient(t)
	done := make(chan error, 1)
	go func() {
		_, err := client.NodeGroupIncreaseSize(brief(t), &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 1})
		done <- err
	}()
	<-entered
	r.cancel()
	for { // the listeners close first
		conn, err := net.Dial("tcp", r.config.Listener.Addr().String())
		if err != nil {
			break
		}
		must(t, conn.Close())
	}
	close(leave)
	if err := <-done; err != nil {
		t.Errorf("the request under way: %v", err)
	}
	must(t, <-r.done)
}

// TestStopDoesNotWaitForEver: what does not end is cut off.
func TestStopDoesNotWaitForEver(t *testing.T) {
	fleet := newFakeFleet(1, 1).show()
	entered := make(chan struct{}, 1)
	fleet.hangs("IncreaseSize", entered)
	r := start(t, fleet, slog.LevelInfo)
	r.stopWithin = 10 * time.Millisecond
	r.run(t)
	client := r.cloudClient(t)
	done := make(chan error, 1)
	go func() {
		_, err := client.NodeGroupIncreaseSize(brief(t), &pb.NodeGroupIncreaseSizeRequest{Id: "group-0", Delta: 1})
		done <- err
	}()
	<-entered
	r.cancel()
	if err := <-done; err == nil {
		t.Error("the request that hung was answered")
	}
	must(t, <-r.done)
}

// TestRunFailsWhenItCannotServe: one broken listener ends the other.
func TestRunFailsWhenItCannotServe(t *testing.T) {
	r := start(t, newFakeFleet(1, 1).show(), slog.LevelInfo)
	must(t, r.config.ExpanderListener.Close())
	if err := r.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "serving gRPC on "+r.config.ExpanderListener.Addr().String()) {
		t.Errorf("got %v", err)
	}
}

func TestRunAfterItsContextEnded(t *testing.T) {
	r := start(t, newFakeFleet(1, 1).show(), slog.LevelInfo)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	must(t, r.Run(ctx))
}

// TestReadsDuringChanges makes requests while the fleet changes under them;
// every answer is one that was true at some moment. The race detector watches.
func TestReadsDuringChanges(t *testing.T) {
	fleet := newFakeFleet(10, 10).show()
	_, conn := plaintext(t, fleet)
	client := pb.NewCloudProviderClient(conn)
	ctx, stop := context.WithCancel(t.Context())
	var changes, reads sync.WaitGroup
	changes.Go(func() {
		for n := 0; ctx.Err() == nil; n++ {
			fleet.change("group-3", func(v *nodegroups.View) { v.Target, v.Group.Max, v.Debug = n, n+1000, "n" })
			if _, err := client.Refresh(t.Context(), &pb.RefreshRequest{}); err != nil {
				t.Errorf("Refresh: %v", err)
			}
		}
	})
	defaults := &pb.NodeGroupAutoscalingOptions{ScaleDownUnneededTime: legacy(time.Minute)}
	for range 4 {
		reads.Go(func() {
			last := int32(0)
			for range 200 {
				groups, err := client.NodeGroups(t.Context(), &pb.NodeGroupsRequest{})
				if err != nil || len(groups.GetNodeGroups()) != 10 || groups.GetNodeGroups()[3].GetMaxSize() < last {
					t.Errorf("NodeGroups: %v, %v after %d", groups, err, last)
					return
				}
				last = groups.GetNodeGroups()[3].GetMaxSize()
				of, err := client.NodeGroupForNode(t.Context(), &pb.NodeGroupForNodeRequest{Node: node(instance(3, 5))})
				if err != nil || of.GetNodeGroup().GetId() != "group-3" {
					t.Errorf("NodeGroupForNode: %v, %v", of, err)
				}
				if _, err := client.NodeGroupTemplateNodeInfo(t.Context(), &pb.NodeGroupTemplateNodeInfoRequest{Id: "group-3"}); err != nil {
					t.Errorf("NodeGroupTemplateNodeInfo: %v", err)
				}
				options, err := client.NodeGroupGetOptions(t.Context(), &pb.NodeGroupAutoscalingOptionsRequest{Id: "group-3", Defaults: defaults})
				if err != nil || options.GetNodeGroupAutoscalingOptions().ScaleDownUnneeded() != time.Minute {
					t.Errorf("NodeGroupGetOptions: %v, %v", options, err)
				}
				if nodes, err := client.NodeGroupNodes(t.Context(), &pb.NodeGroupNodesRequest{Id: "group-3"}); err != nil || len(nodes.GetInstances()) != 10 {
					t.Errorf("NodeGroupNodes: %v, %v", nodes, err)
				}
			}
		})
	}
	reads.Wait()
	stop()
	changes.Wait()
}
