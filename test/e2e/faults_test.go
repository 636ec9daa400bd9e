package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	admissionregistration "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-ci/hearth/internal/playground"
	"github.com/hearth-ci/hearth/internal/refautoscaler"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/protos/expander"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// TestProviderKilledWhileScalingUp: after kill -9 at any step of a launch the
// next life goes on where the record and the cloud say that the last one was.
// Each group is held at another step by having its next write refused.
func TestProviderKilledWhileScalingUp(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", alone+fleet("1s", "hearth.dev/role: runner", "recorded", "ordered", "born", "registered"))
	g.Autoscaler(nil)
	refusals := []refusal{
		g.cloudRefusals("recorded"),
		{admissionregistration.Create, "nodes", `object.metadata.labels["hearth.dev/node-group"] == "born"`},
	}
	ordered, born := 0, model.InstancePending
	if onAWS() { // which launches at once, and runs what does not register
		ordered, born = 2, model.InstanceRunning
	} else {
		refusals = append(refusals, refusal{admissionregistration.Update, "configmaps", `object.metadata.name == "hearth-kwok-ordered" && object.data.state.contains("\"instances\"")`})
	}
	allow := g.refuse(refusals...)
	var pods []string
	submit := func(groups ...string) {
		for _, group := range groups {
			for n := range 2 {
				pod := fmt.Sprintf("%s-%d", group, n)
				g.submit(playground.Job{Name: pod, Group: group, Key: "acme/api", CPU: "6"})
				pods = append(pods, pod)
			}
		}
	}
	submit("recorded", "ordered", "born")
	g.eventually("every group to be at its step", 30*time.Second, all(
		g.sizes("recorded", 2, 0), g.cloudHas("recorded", 0, 0, model.InstancePending),
		g.sizes("ordered", 2, 0), g.cloudHas("ordered", 2, ordered, born),
		g.sizes("born", 2, 0), g.cloudHas("born", 2, 2, born),
	))
	submit("registered")
	g.eventually("its nodes to register", 20*time.Second, func() error {
		if nodes, err := g.nodes("registered"); err != nil || len(nodes) == 0 {
			return errors.Join(err, errors.New("there are none"))
		}
		return nil
	})
	// Twice: a life that comes to nothing must not cost anything either.
	g.restart(provider, func() {})
	g.restart(provider, allow)

	g.eventually("the pods to run", 60*time.Second, g.pods(corev1.PodRunning, pods...))
	for _, group := range []string{"recorded", "ordered", "born", "registered"} {
		g.eventually("everybody to agree", 20*time.Second, g.accounted(group, 2, 2))
	}
}

// TestProviderKilledWhileScalingDown: after kill -9 at any step of a removal
// the next life finishes it, and removes nothing else.
func TestProviderKilledWhileScalingDown(t *testing.T) {
	g := newGround(t)
	const short = "hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s, "
	groups := []string{"accepted", "tainted", "stopping", "terminating", "forgotten"}
	provider := g.Provider("provider", alone+fleet("1s", short+"hearth.dev/role: runner", groups...)+`- id: plain
  max: 10
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
  annotations: {hearth.dev/scale-down-unneeded-time: 1s}
`)
	groups = append(groups, "plain")
	g.Autoscaler(nil)
	var pods []string
	for _, group := range groups {
		for _, name := range []string{"goes", "stays"} {
			pods = append(pods, group+"-"+name)
			g.submit(playground.Job{Name: group + "-" + name, Group: group, Key: "acme/api", CPU: "6"})
		}
	}
	g.eventually("the pods to run", 60*time.Second, g.pods(corev1.PodRunning, pods...))
	for _, group := range groups {
		g.eventually("everybody to agree", 20*time.Second, g.accounted(group, 2, 2))
	}
	going := map[string]string{}
	for _, group := range groups {
		going[group] = g.nodeOf(group + "-goes")
	}

	const ofGroup = `object.metadata.labels["hearth.dev/node-group"] == `
	allow := g.refuse(
		refusal{admissionregistration.Update, "nodes", ofGroup + `"accepted" && has(object.spec.taints) && object.spec.taints.exists(t, t.key.endsWith("hearth-draining"))`},
		refusal{admissionregistration.Update, "runnernodegroups/status", `object.metadata.name == "tainted" && has(object.status.intents) && object.status.intents.exists(i, i.stage == "Stopping")`},
		g.cloudRefusals("stopping", "plain"),
		refusal{admissionregistration.Delete, "nodes", "oldO" + ofGroup[1:] + `"terminating"`},
		refusal{admissionregistration.Delete, "runnernodes", `oldObject.spec.nodeGroup == "forgotten"`},
	)
	for _, group := range groups {
		g.finish(group + "-goes")
	}
	g.eventually("every group to be at its step", 60*time.Second, all(
		g.intents("accepted", "Draining", 1),
		g.intents("tainted", "Draining", 1), g.nodeThat(going["tainted"], tainted(drainTaint)),
		g.intents("stopping", "Stopping", 1), g.cloudHas("stopping", 2, 2, model.InstanceRunning),
		g.intents("plain", "Stopping", 1), g.cloudHas("plain", 2, 2, model.InstanceRunning),
		g.intents("terminating", "Stopping", 1), g.cloudHas("terminating", 1, 0, model.InstanceTerminating),
		g.gone(going["forgotten"]), g.intents("forgotten", "", 0), g.cloudHas("forgotten", 1, 1, model.InstanceRunning),
	))
	// Twice, as above.
	g.restart(provider, func() {})
	g.restart(provider, allow)

	for _, group := range groups {
		g.eventually("the removal to end", 40*time.Second, all(g.gone(going[group]), g.accounted(group, 1, 2)))
		g.must(g.pods(corev1.PodRunning, group+"-stays")())
	}
}

// TestCertificatesAreDemanded: the CloudProvider's port takes nobody without a
// certificate of its authority, the expander's takes everybody who speaks TLS.
func TestCertificatesAreDemanded(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("1s", 5, ""))
	foreign, err := playground.NewAuthority(t.TempDir())
	g.must(err)
	plain := func(address string) *grpc.ClientConn {
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		g.must(err)
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	ask := func(conn *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(g.ctx, 5*time.Second)
		defer cancel()
		_, err := externalgrpc.NewCloudProviderClient(conn).NodeGroups(ctx, &externalgrpc.NodeGroupsRequest{})
		return err
	}
	rank := func(conn *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(g.ctx, 5*time.Second)
		defer cancel()
		answer, err := expander.NewExpanderClient(conn).BestOptions(ctx, &expander.BestOptionsRequest{
			Options: []*expander.Option{{NodeGroupId: "runners", NodeCount: 1}},
		})
		if err == nil && len(answer.GetOptions()) != 1 {
			err = fmt.Errorf("%d options are left", len(answer.GetOptions()))
		}
		return err
	}
	for _, tc := range []struct {
		name    string
		refused bool
		// why is a part of what the client is told.
		why string
		ask func() error
	}{
		{"without a certificate", true, "certificate required", func() error { return ask(g.dial(provider.Address)) }},
		{"a foreign authority's certificate", true, "unknown certificate authority", func() error {
			return ask(g.dial(provider.Address, g.certificate(foreign, "stranger")))
		}},
		{"without TLS", true, "", func() error { return ask(plain(provider.Address)) }},
		{"our authority's certificate", false, "", func() error {
			return ask(g.dial(provider.Address, g.certificate(g.Authority, "autoscaler")))
		}},
		{"expander, without a certificate", false, "", func() error { return rank(g.dial(provider.ExpanderAddress)) }},
		{"expander, without TLS", true, "", func() error { return rank(plain(provider.ExpanderAddress)) }},
	} {
		err := tc.ask()
		// In TLS 1.3 the client may write, and find the connection closed,
		// before it reads why.
		for tries := 0; tries < 20 && status.Code(err) == codes.Unavailable && !strings.Contains(err.Error(), tc.why); tries++ {
			err = tc.ask()
		}
		switch {
		case tc.refused && status.Code(err) != codes.Unavailable:
			t.Errorf("%s: %v, want a refusal", tc.name, err)
		case tc.refused && !strings.Contains(err.Error(), tc.why):
			t.Errorf("%s: refused with %v, want %q", tc.name, err, tc.why)
		case !tc.refused && err != nil:
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	if begun, _ := g.requests(provider, "NodeGroups"); begun != 1 {
		t.Errorf("%g requests got through, want 1", begun)
	}
}

// TestCertificatesRotateUnderLoad: the files are replaced again and again, the
// key before the certificate, and no request fails, neither on a connection
// that lasts nor on a new one.
func TestCertificatesRotateUnderLoad(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("1s", 5, ""))
	_, err := g.CloudProvider().NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: "runners", Delta: 1})
	g.must(err)
	g.eventually("a node", 20*time.Second, g.accounted("runners", 1, 1))
	nodes, err := g.nodes("runners")
	g.must(err)
	client := g.certificate(g.Authority, "autoscaler")
	fresh := func() (externalgrpc.CloudProviderClient, func()) {
		conn := g.dial(provider.Address, client)
		return externalgrpc.NewCloudProviderClient(conn), func() { _ = conn.Close() }
	}
	var total tally
	var stops []func()
	for range 3 {
		lasting := externalgrpc.NewCloudProviderClient(g.dial(provider.Address, client))
		stops = append(stops,
			g.load(&total, time.Millisecond, func() (externalgrpc.CloudProviderClient, func()) { return lasting, func() {} }, reads("runners", wire(&nodes[0]))),
			g.load(&total, time.Millisecond, fresh, reads("runners", wire(&nodes[0]))[:2]))
	}
	for n := range 10 {
		before, _, _ := total.result()
		_, err := g.Authority.Issue(provider.Name)
		g.must(err)
		if got, want := shown(g, provider.Address, client), inFile(g, provider.TLS.Cert); !got.Equal(want) {
			t.Errorf("rotation %d: a new connection is shown certificate %v, want %v", n, got.SerialNumber, want.SerialNumber)
		}
		g.eventually("requests after it", 5*time.Second, func() error {
			if good, failed, _ := total.result(); len(failed) == 0 && good["NodeGroups"] < before["NodeGroups"]+20 {
				return fmt.Errorf("%v, before it %v", good, before)
			}
			return nil
		})
	}
	for _, stop := range stops {
		stop()
	}
	good, failed, slowest := total.result()
	if len(failed) > 0 {
		t.Errorf("%d requests failed, the first: %v", len(failed), failed[0])
	}
	t.Logf("requests: %v, the slowest took %s", good, slowest)
}

// shown returns the certificate that a server shows on a new connection.
func shown(g *ground, address string, client tls.Certificate) *x509.Certificate {
	g.t.Helper()
	conn := g.dial(address, client)
	defer conn.Close()
	var from peer.Peer
	_, err := externalgrpc.NewCloudProviderClient(conn).NodeGroups(g.ctx, &externalgrpc.NodeGroupsRequest{}, grpc.Peer(&from))
	g.must(err)
	return from.AuthInfo.(credentials.TLSInfo).State.PeerCertificates[0]
}

// inFile reads a certificate.
func inFile(g *ground, path string) *x509.Certificate {
	g.t.Helper()
	text, err := os.ReadFile(path)
	g.must(err)
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	g.must(err)
	return cert
}

// TestStandByTakesOver: of two replicas both are Ready and one serves. When it
// is killed the other goes on with what it had begun; when it is asked to end,
// it answers what it had accepted and lets go of the lease at once.
func TestStandByTakesOver(t *testing.T) {
	g := newGround(t)
	groups := runners("2s", 5, "")
	first := g.Provider("first", groups)
	second, err := g.StartProvider("second", groups)
	g.must(err)
	client := g.certificate(g.Authority, "autoscaler")
	toFirst, toSecond := g.dial(first.Address, client), g.dial(second.Address, client)
	standsBy := func(p *playground.Provider, conn *grpc.ClientConn) {
		t.Helper()
		g.eventually("the stand-by to be ready", 20*time.Second, func() error { return p.Ready(g.ctx) })
		g.must(p.Ready(g.ctx))
		if state, err := g.health(conn); err != nil || state != grpc_health_v1.HealthCheckResponse_NOT_SERVING {
			t.Errorf("the stand-by is %s (%v)", state, err)
		}
		_, err := externalgrpc.NewCloudProviderClient(conn).NodeGroups(g.ctx, &externalgrpc.NodeGroupsRequest{})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("the stand-by answers %v, want Unavailable", err)
		}
	}
	standsBy(second, toSecond)
	g.must(first.Ready(g.ctx))

	g.Autoscaler(nil)
	g.submit(job("one", "acme/api"), job("two", "acme/web"))
	g.eventually("the scale-up to be accepted", 20*time.Second, g.sizes("runners", 2, 0))
	first.Kill()
	died := time.Now()
	g.must(second.Serving(g.ctx, 20*time.Second))
	t.Logf("the stand-by served %s after the leader's death", time.Since(died).Round(time.Millisecond))
	g.eventually("the pods to run", 60*time.Second, g.pods(corev1.PodRunning, "one", "two"))
	g.eventually("everybody to agree", 20*time.Second, g.accounted("runners", 2, 2))

	g.must(first.Restart())
	standsBy(first, toFirst)
	// An answer cannot be given while the API server does not confirm the record.
	resume := g.pauseAPIServer()
	answered := make(chan error, 1)
	go func() {
		_, err := externalgrpc.NewCloudProviderClient(toSecond).NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: "runners", Delta: 1})
		answered <- err
	}()
	g.eventually("the request to be in flight", 2*time.Second, func() error {
		if begun, done := g.requests(second, "NodeGroupIncreaseSize"); begun != done+1 {
			return fmt.Errorf("%g requests, %g answers", begun, done)
		}
		return nil
	})
	ended := make(chan error, 1)
	go func() { ended <- second.Terminate(g.ctx) }()
	g.eventually("it to stop listening", 2*time.Second, func() error {
		conn, err := tls.Dial("tcp", second.Address, &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			return errors.Join(conn.Close(), errors.New("it listens"))
		}
		return nil
	})
	resume()
	if err := <-answered; err != nil {
		t.Errorf("the request in flight was answered %v", err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the leader ended with %v, want exit code 0", err)
	}
	gone := time.Now()
	g.must(first.Serving(g.ctx, 5*time.Second)) // sooner than the lease would end
	t.Logf("the stand-by served %s after the leader had ended", time.Since(gone).Round(time.Millisecond))
	g.eventually("everybody to agree", 40*time.Second, g.accounted("runners", 3, 3))
}

// TestAPIServerAway: reads go on from what is known while the API server does
// not answer, and while it is gone; nothing is promised that cannot be
// recorded.
//
// The leader keeps its lease here because its lease is long: with a renewDeadline
// shorter than the outage it has to assume that another replica leads, and ends.
func TestAPIServerAway(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", "leaderElection: {leaseDuration: 120s, renewDeadline: 110s, retryPeriod: 1s}\n"+
		fleet("1s", "hearth.dev/role: runner", "runners")+`- id: plain
  max: 10
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
`)
	g.Autoscaler(nil)
	g.submit(job("one", "acme/api"), playground.Job{Name: "two", Group: "plain", CPU: "6"})
	g.eventually("the pods to run", 40*time.Second, g.pods(corev1.PodRunning, "one", "two"))
	g.eventually("everybody to agree", 20*time.Second, all(g.accounted("runners", 1, 1), g.accounted("plain", 1, 1)))
	node, err := g.node(g.nodeOf("one"))
	g.must(err)
	other, err := g.node(g.nodeOf("two"))
	g.must(err)

	conn := g.dial(provider.Address, g.certificate(g.Authority, "tester"))
	ca := externalgrpc.NewCloudProviderClient(conn)
	writes := []read{
		{"NodeGroupIncreaseSize", func(ctx context.Context, ca externalgrpc.CloudProviderClient) error {
			_, err := ca.NodeGroupIncreaseSize(ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: "runners", Delta: 1})
			return err
		}},
		{"NodeGroupDeleteNodes", func(ctx context.Context, ca externalgrpc.CloudProviderClient) error {
			_, err := ca.NodeGroupDeleteNodes(ctx, &externalgrpc.NodeGroupDeleteNodesRequest{Id: "plain", Nodes: []*externalgrpc.ExternalGrpcNode{wire(other)}})
			return err
		}},
	}
	// outage makes requests until over is.
	outage := func(what string, over func()) {
		t.Helper()
		var read, written tally
		same := func() (externalgrpc.CloudProviderClient, func()) { return ca, func() {} }
		stops := []func(){
			g.load(&read, 10*time.Millisecond, same, reads("runners", wire(node))),
			g.load(&written, time.Second, same, writes),
		}
		over()
		for _, stop := range stops {
			stop()
		}
		good, failed, slowest := read.result()
		t.Logf("%s: reads %v, the slowest took %s", what, good, slowest)
		if len(failed) > 0 {
			t.Errorf("%s: %d reads failed, the first: %v", what, len(failed), failed[0])
		}
		if good["Refresh"] < 5 {
			t.Errorf("%s: %d loops of reads", what, good["Refresh"])
		}
		good, failed, _ = written.result()
		if len(good) > 0 || len(failed) == 0 {
			t.Errorf("%s: %v writes were accepted, %d not", what, good, len(failed))
		}
		for _, err := range failed {
			if status.Code(err) != codes.Unavailable {
				t.Errorf("%s: %v, want Unavailable", what, err)
			}
		}
	}

	resume := g.pauseAPIServer()
	outage("no answers", func() { time.Sleep(10 * time.Second) })
	resume()
	g.submit(job("three", "acme/api"))
	g.eventually("a new pod to run", 30*time.Second, g.pods(corev1.PodRunning, "three"))
	g.eventually("everybody to agree", 20*time.Second, all(g.accounted("runners", 2, 2), g.accounted("plain", 1, 1)))

	g.Cluster.StopAPIServer()
	outage("gone", func() { time.Sleep(30 * time.Second) }) // as long as the outage that has to be endured
	text, err := provider.Metrics(g.ctx)
	g.must(err)
	if age := metric(text, "hearth_snapshot_age_seconds"); age < 25 && !onAWS() { // AWS is read past the API server
		t.Errorf("the snapshot is said to be %g seconds old", age)
	}
	g.must(g.Cluster.StartAPIServer(g.ctx))
	g.eventually("a write to be accepted", 10*time.Second, func() error { return writes[0].do(g.ctx, ca) })
	g.eventually("a launch", 10*time.Second, g.cloudHas("runners", 3, 3, model.InstanceRunning))
	// Scheduler and kubelets take up to a minute until they try again.
	g.eventually("everybody to agree", 100*time.Second, all(g.accounted("runners", 3, 3), g.accounted("plain", 1, 1)))
}

// TestAutoscalerRestarts: an autoscaler that is killed remembers nothing. What
// it ordered is not ordered twice, and what it drained stays drained.
func TestAutoscalerRestarts(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("3s", 10, "hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s"))
	autoscaler := g.Autoscaler(nil)
	restart := func() {
		autoscaler.Kill()
		autoscaler = g.Autoscaler(nil)
	}
	pods := []string{"one", "two", "three", "four", "five"} // enough for a group to be called unhealthy
	for _, name := range pods {
		g.submit(job(name, "acme/api"))
	}
	g.eventually("the launches", 20*time.Second, all(g.sizes("runners", 5, 0), g.cloudHas("runners", 5, 5, model.InstancePending)))
	restart()
	g.eventually("the pods to run", 40*time.Second, g.pods(corev1.PodRunning, pods...))
	g.eventually("everybody to agree", 20*time.Second, g.accounted("runners", 5, 5))

	allow := g.refuse(refusal{admissionregistration.Update, "runnernodegroups/status",
		`has(object.status.intents) && object.status.intents.exists(i, i.stage == "Stopping")`})
	going := g.nodeOf("one")
	g.finish("one")
	drains := g.nodeThat(going, tainted(drainTaint))
	g.eventually("the drain", 40*time.Second, all(drains, g.intents("runners", "Draining", 1)))
	restart()
	_, loops := g.requests(provider, "Refresh")
	g.eventually("loops of the next life", 20*time.Second, func() error {
		g.must(drains())
		if _, now := g.requests(provider, "Refresh"); now < loops+4 {
			return fmt.Errorf("there were %g", now-loops)
		}
		return nil
	})
	g.must(g.intents("runners", "Draining", 1)())
	allow()
	g.eventually("the node to go", 30*time.Second, all(g.gone(going), g.accounted("runners", 4, 5)))
}

// TestConnectionsSilentlyDropped: no packet arrives any more on the connections
// between autoscaler and provider, and neither end is told. The autoscaler's
// requests time out until its liveness probe has it started again.
func TestConnectionsSilentlyDropped(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", runners("1s", 5, ""))
	autoscaler := g.Autoscaler(func(f *refautoscaler.Flags) { f.MaxFailingTime = 8 * time.Second })
	g.submit(job("one", "acme/api"))
	g.eventually("the pod to run", 40*time.Second, g.pods(corev1.PodRunning, "one"))
	g.DropConnections()
	g.submit(job("two", "acme/api"))
	g.eventually("the autoscaler to be started again", 60*time.Second, func() error {
		if autoscaler.Restarts() == 0 {
			return errors.New("it was not")
		}
		return nil
	})
	g.eventually("the next pod to run", 40*time.Second, g.pods(corev1.PodRunning, "two"))
	g.eventually("everybody to agree", 20*time.Second, g.accounted("runners", 2, 2))
}

// TestNodesDie: the target size follows a node that dies, idle or busy. What
// the cloud launches in its place is hidden until it is Ready (ADR 0003).
func TestNodesDie(t *testing.T) {
	g := newGround(t)
	g.Provider("provider", runners("3s", 5, ""))
	g.Autoscaler(nil)
	g.submit(job("job", "acme/api"), job("over", "acme/api"))
	g.eventually("the pods to run", 40*time.Second, g.pods(corev1.PodRunning, "job", "over"))
	g.finish("over")
	g.eventually("a busy and an idle node", 20*time.Second, g.accounted("runners", 2, 2))
	dying, err := g.nodes("runners")
	g.must(err)
	for _, node := range dying {
		g.must(g.cloud.KillInstance(g.ctx, model.InstanceID(node.Spec.ProviderID)))
	}
	g.eventually("the sizes to follow", 30*time.Second, g.sizes("runners", 0, 2))
	for _, node := range dying {
		g.eventually("the dead node to go", 20*time.Second, g.gone(node.Name))
	}
	// What the CI system does with a job whose runner is lost.
	g.finish("job")
	g.submit(job("again", "acme/api"))
	g.eventually("the job to run again", 40*time.Second, g.pods(corev1.PodRunning, "again"))
	g.eventually("everybody to agree", 20*time.Second, g.accounted("runners", 2, 4))
}

// TestConfigReload: a bad config file is refused and the one before stays in
// force; a good one is in force at once, but for the list of groups, which
// changes at the autoscaler's next Refresh.
func TestConfigReload(t *testing.T) {
	g := newGround(t)
	provider := g.Provider("provider", runners("1s", 2, ""))
	ca := g.CloudProvider()
	list := func() map[string]int {
		t.Helper()
		answer, err := ca.NodeGroups(g.ctx, &externalgrpc.NodeGroupsRequest{})
		g.must(err)
		sizes := map[string]int{}
		for _, group := range answer.GetNodeGroups() {
			sizes[group.GetId()] = int(group.GetMaxSize())
		}
		return sizes
	}
	refresh := func() {
		t.Helper()
		_, err := ca.Refresh(g.ctx, &externalgrpc.RefreshRequest{})
		g.must(err)
	}
	reloaded := func(successful float64, reloads float64) func() error {
		return func() error {
			text, err := provider.Metrics(g.ctx)
			if err != nil {
				return err
			}
			if s, n := metric(text, "hearth_config_last_reload_successful"), metric(text, "hearth_config_reloads_total"); s != successful || n != reloads {
				return fmt.Errorf("hearth_config_last_reload_successful is %g after %g reloads, want %g after %g", s, n, successful, reloads)
			}
			return nil
		}
	}
	with := func(size int) string {
		groups := strings.SplitAfter(runners("1s", size, ""), "nodeGroups:\n")[1]
		text, err := g.config(fleet("1s", "hearth.dev/role: runner", "fresh") + groups)
		g.must(err)
		return text
	}
	reloads := 0.0
	more := with(2)
	for what, bad := range map[string]string{
		"an unknown field":             "maximum: 9\n" + more,
		"a field of another type":      "engines: many\n" + more,
		"no YAML":                      more + "}\n",
		"a field that needs a restart": "leaderElection: {enabled: false}\n" + more,
	} {
		g.must(provider.WriteConfig(bad))
		reloads++
		g.eventually(what+" to be refused", 10*time.Second, reloaded(0, reloads))
		if refresh(); !maps.Equal(list(), map[string]int{"runners": 2}) {
			t.Errorf("%s: the groups are %v", what, list())
		}
		_, err := ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: "runners", Delta: 3})
		if status.Code(err) != codes.OutOfRange {
			t.Errorf("%s: three nodes: %v, want OutOfRange", what, err)
		}
	}
	g.must(provider.WriteConfig(with(3)))
	g.eventually("the good one to be taken", 10*time.Second, reloaded(1, reloads+1))
	if got := list(); !maps.Equal(got, map[string]int{"runners": 2}) {
		t.Errorf("before the next Refresh the groups are %v", got)
	}
	g.eventually("the new group", 30*time.Second, func() error {
		refresh()
		if got := list(); !maps.Equal(got, map[string]int{"runners": 3, "fresh": 10}) {
			return fmt.Errorf("the groups are %v", got)
		}
		return nil
	})
	for _, group := range []string{"runners", "fresh"} {
		_, err := ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: group, Delta: 3})
		g.must(err)
	}
	g.eventually("nodes of both groups", 30*time.Second, all(g.readyNodes("runners", 3), g.readyNodes("fresh", 3)))
}

// TestBadInput: what no autoscaler should send is refused with the right code
// and changes nothing.
func TestBadInput(t *testing.T) {
	g := newGround(t)
	groups := func(least int) string {
		return runners("1s", 3, "") + fmt.Sprintf(`- id: plain
  min: %d
  max: 3
  template: {capacity: {cpu: "8", memory: 32Gi, pods: "110"}}
`, least)
	}
	provider := g.Provider("provider", groups(0))
	conn := g.dial(provider.Address, g.certificate(g.Authority, "tester"))
	ca := externalgrpc.NewCloudProviderClient(conn)
	for _, group := range []string{"runners", "plain"} {
		_, err := ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: group, Delta: 1})
		g.must(err)
	}
	settled := all(g.accounted("runners", 1, 1), g.accounted("plain", 1, 1))
	g.eventually("a node of each group", 20*time.Second, settled)
	text, err := g.config(groups(1))
	g.must(err)
	g.must(provider.WriteConfig(text))
	g.eventually("the minimum", 30*time.Second, func() error {
		_, err := ca.Refresh(g.ctx, &externalgrpc.RefreshRequest{})
		if said := g.told(ca); err == nil && !strings.Contains(said, "plain 1 to 3") {
			err = errors.New(said)
		}
		return err
	})
	nodes, err := g.nodes("runners")
	g.must(err)
	own := wire(&nodes[0])
	nodes, err = g.nodes("plain")
	g.must(err)
	plain := wire(&nodes[0])

	type node = externalgrpc.ExternalGrpcNode
	call := func(method string, request any, options ...grpc.CallOption) error {
		ctx, cancel := context.WithTimeout(g.ctx, 10*time.Second)
		defer cancel()
		return conn.Invoke(ctx, "/"+externalgrpc.CloudProvider_ServiceDesc.ServiceName+"/"+method, request, &externalgrpc.RefreshResponse{}, options...)
	}
	increase := func(id string, delta int32) error {
		return call("NodeGroupIncreaseSize", &externalgrpc.NodeGroupIncreaseSizeRequest{Id: id, Delta: delta})
	}
	decrease := func(id string, delta int32) error {
		return call("NodeGroupDecreaseTargetSize", &externalgrpc.NodeGroupDecreaseTargetSizeRequest{Id: id, Delta: delta})
	}
	remove := func(id string, nodes ...*node) error {
		return call("NodeGroupDeleteNodes", &externalgrpc.NodeGroupDeleteNodesRequest{Id: id, Nodes: nodes})
	}
	whose := func(n *node) error {
		return call("NodeGroupForNode", &externalgrpc.NodeGroupForNodeRequest{Node: n})
	}
	raw := func(method, body string) error { return call(method, []byte(body), grpc.ForceCodecV2(bytesCodec{})) }
	padded := func(n *node, bytes int) *node {
		return &node{ProviderID: n.GetProviderID(), Name: n.GetName(), Annotations: map[string]string{"padding": strings.Repeat("x", bytes)}}
	}
	stranger := func(id string) *node { return &node{ProviderID: id, Name: "stranger"} }

	before := g.told(ca)
	for _, tc := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"unknown group: IncreaseSize", increase("nobody", 1), codes.NotFound},
		{"unknown group: DecreaseTargetSize", decrease("nobody", -1), codes.NotFound},
		{"unknown group: DeleteNodes", remove("nobody", own), codes.NotFound},
		{"unknown group: TargetSize", call("NodeGroupTargetSize", &externalgrpc.NodeGroupTargetSizeRequest{Id: "nobody"}), codes.NotFound},
		{"unknown group: Nodes", call("NodeGroupNodes", &externalgrpc.NodeGroupNodesRequest{Id: "nobody"}), codes.NotFound},
		{"unknown group: TemplateNodeInfo", call("NodeGroupTemplateNodeInfo", &externalgrpc.NodeGroupTemplateNodeInfoRequest{Id: "nobody"}), codes.NotFound},
		{"unknown group: GetOptions", call("NodeGroupGetOptions", &externalgrpc.NodeGroupAutoscalingOptionsRequest{Id: "nobody"}), codes.NotFound},
		{"no group", increase("", 1), codes.NotFound},
		{"group of 10 MB", increase(strings.Repeat("g", 10<<20), 1), codes.InvalidArgument},

		{"increase by 0", increase("runners", 0), codes.InvalidArgument},
		{"increase by -1", increase("runners", -1), codes.InvalidArgument},
		{"increase over max", increase("runners", 3), codes.OutOfRange},
		{"increase by far too much", increase("runners", math.MaxInt32), codes.OutOfRange},
		{"decrease by 0", decrease("runners", 0), codes.InvalidArgument},
		{"decrease by +1", decrease("runners", 1), codes.InvalidArgument},
		// An error would end the autoscaler's loop for all groups.
		{"decrease although all are born", decrease("runners", -1), codes.OK},
		{"decrease by far too much", decrease("runners", math.MinInt32), codes.OK},

		{"delete nothing", remove("runners"), codes.InvalidArgument},
		{"delete an empty node", remove("runners", &node{}), codes.InvalidArgument},
		{"delete a node without providerID", remove("runners", own, stranger("")), codes.InvalidArgument},
		{"delete another group's node", remove("runners", plain), codes.InvalidArgument},
		{"delete a node of each group", remove("plain", plain, own), codes.InvalidArgument},
		{"delete a foreign node", remove("runners", stranger("aws:///eu-central-1a/i-0123456789abcdef0")), codes.NotFound},
		{"delete a node with a strange id", remove("runners", stranger("\x00 /../ \u2028")), codes.NotFound},
		{"delete an instance of ours that never was", remove("runners", stranger("kwok://runners/nothing")), codes.NotFound},
		{"delete an instance that never was", remove("runners", stranger("aws:///a/i-0123456789abcdef0")), codes.NotFound},
		{"delete a good and an unknown node", remove("plain", plain, stranger("kwok://plain/nothing")), codes.NotFound},
		{"delete what the plan keeps", remove("runners", own), codes.FailedPrecondition},
		{"delete it twice in one call", remove("runners", own, own), codes.FailedPrecondition},
		{"delete below min, twice in one call", remove("plain", plain, plain), codes.OutOfRange},

		{"whose is no node", whose(nil), codes.InvalidArgument},
		{"whose is an empty node", whose(&node{}), codes.OK},
		{"whose is a foreign node", whose(stranger("aws:///eu-central-1a/i-0123456789abcdef0")), codes.OK},

		{"providerID of 10 MB", remove("runners", stranger(strings.Repeat("i", 10<<20))), codes.InvalidArgument},
		{"10 MB around a good id", whose(padded(own, 10<<20)), codes.OK},
		{"10 MB around what the plan keeps", remove("runners", padded(own, 10<<20)), codes.FailedPrecondition},
		{"17 MB", remove("plain", padded(plain, 17<<20)), codes.ResourceExhausted},

		// 1: delta or a node, 2: id. None is sent as a client library would.
		{"group id that is not UTF-8", raw("NodeGroupIncreaseSize", "\x08\x01\x12\x02\xff\xfe"), codes.InvalidArgument},
		{"providerID that is not UTF-8", raw("NodeGroupDeleteNodes", "\x0a\x04\x0a\x02\xff\xfe\x12\x05plain"), codes.InvalidArgument},
		{"whose is a node that is not UTF-8", raw("NodeGroupForNode", "\x0a\x04\x0a\x02\xff\xfe"), codes.InvalidArgument},
		{"truncated", raw("NodeGroupDeleteNodes", "\x0a\x7f"), codes.InvalidArgument},
		{"no such method", raw("NodeGroupRename", ""), codes.Unimplemented},
	} {
		if status.Code(tc.err) != tc.want {
			t.Errorf("%s: %.300v, want %s", tc.name, tc.err, tc.want)
		}
	}
	g.always("it changed something", 2*time.Second, func() error {
		if after := g.told(ca); after != before {
			return fmt.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
		return settled()
	})

	// What is named twice counts once.
	g.must(increase("plain", 1))
	g.eventually("a second node", 20*time.Second, g.accounted("plain", 2, 2))
	g.must(remove("plain", plain, padded(plain, 1), plain))
	g.eventually("one of them to go", 20*time.Second, all(g.gone(plain.GetName()), g.accounted("plain", 1, 2)))
}

// told is everything that an autoscaler is told of the groups' sizes and
// instances, and the sequence of their records.
func (g *ground) told(ca externalgrpc.CloudProviderClient) string {
	g.t.Helper()
	answer, err := ca.NodeGroups(g.ctx, &externalgrpc.NodeGroupsRequest{})
	g.must(err)
	var lines []string
	for _, group := range answer.GetNodeGroups() {
		size, err := ca.NodeGroupTargetSize(g.ctx, &externalgrpc.NodeGroupTargetSizeRequest{Id: group.GetId()})
		g.must(err)
		listed, err := ca.NodeGroupNodes(g.ctx, &externalgrpc.NodeGroupNodesRequest{Id: group.GetId()})
		g.must(err)
		var instances []string
		for _, i := range listed.GetInstances() {
			instances = append(instances, fmt.Sprintf("%s %s", i.GetId(), i.GetStatus().GetInstanceState()))
		}
		record, err := g.group(group.GetId())
		g.must(err)
		slices.Sort(instances)
		lines = append(lines, fmt.Sprintf("%s %d to %d: %d of %q, record %d", group.GetId(), group.GetMinSize(), group.GetMaxSize(), size.GetTargetSize(), instances, record.Status.Sequence))
	}
	return strings.Join(lines, "\n")
}

// bytesCodec sends bytes as they are and does not look at answers.
type bytesCodec struct{}

func (bytesCodec) Name() string { return "proto" }

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (bytesCodec) Unmarshal(mem.BufferSlice, any) error { return nil }
