package e2e

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hearth-ci/hearth/internal/aws/awsfake"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/protos/externalgrpc"
)

// TestAWS: on Auto Scaling groups a job gets a node, its idle node is parked in
// standby, comes back for the next job of its key and is terminated when
// parking is off. All other tests run on this backend too, when
// HEARTH_E2E_BACKEND is "aws".
func TestAWS(t *testing.T) {
	g := newGroundOn(t, true)
	amazon := g.cloud.(*amazon)
	amazon.bare = true
	g.Provider("provider", runners("1s", 5, `hearth.dev/park: stop, hearth.dev/max-idle: 1s, hearth.dev/scale-down-unneeded-time: 1s`))
	g.Autoscaler(nil)
	has := func(lifecycle, state string) func() error {
		return func() error {
			all := amazon.All()
			if len(all) != 1 || all[0].Lifecycle != lifecycle || all[0].State != state {
				return fmt.Errorf("AWS has %+v, want one instance %s and %s", all, lifecycle, state)
			}
			return nil
		}
	}
	g.submit(job("api", "acme/api"))
	g.eventually("the job to run", 40*time.Second, g.pods(corev1.PodRunning, "api"))
	instance := g.instanceOf("api")
	if want := "aws:///a/" + amazon.All()[0].ID; string(instance) != want {
		t.Errorf("the node's providerID is %s, want %s", instance, want)
	}
	g.finish("api")
	g.eventually("the node to be parked", 60*time.Second, func() error {
		rng, err := g.group("runners")
		if err == nil && rng.Status.Parked != 1 {
			err = fmt.Errorf("%d are told to be parked", rng.Status.Parked)
		}
		return errors.Join(err, has("Standby", "stopped")(), g.readyNodes("runners", 0)(), g.sizes("runners", 0, 0)())
	})
	if asg, _ := amazon.Group("runners"); asg.Desired != 0 {
		t.Errorf("the desired capacity is %d, want 0", asg.Desired)
	}
	g.submit(job("again", "acme/api"))
	g.eventually("the job to run again", 60*time.Second, g.pods(corev1.PodRunning, "again"))
	if again := g.instanceOf("again"); again != instance {
		t.Errorf("the job runs on %s, want the parked %s", again, instance)
	}
	g.eventually("the instance to be protected", 30*time.Second, func() error {
		if i := amazon.All()[0]; !i.Protected {
			return fmt.Errorf("%+v", i)
		}
		return has("InService", "running")()
	})
	g.annotateGroup("runners", map[string]any{model.Prefix + "/park": "off"})
	g.finish("again")
	g.eventually("the instance to go", 60*time.Second, func() error {
		return errors.Join(has("", "terminated")(), g.readyNodes("runners", 0)())
	})
	if n := amazon.Count("TerminateInstanceInAutoScalingGroup"); n != 1 {
		t.Errorf("%d terminations were asked for", n)
	}
}

// TestAWSDryRun: beside another provider Hearth watches. It writes nothing but
// its own records, and refuses to act.
func TestAWSDryRun(t *testing.T) {
	if !onAWS() {
		t.Skip("runs with HEARTH_E2E_BACKEND=aws")
	}
	g := newGroundOn(t, true)
	amazon := g.cloud.(*amazon)
	amazon.bare = true
	text, err := amazon.translate(runners("1s", 5, `hearth.dev/park: stop, hearth.dev/min-warm: "3"`))
	g.must(err)
	amazon.Edit("runners", func(asg *awsfake.Group) { asg.Desired = 2 }) // by the other provider
	p, err := g.StartProvider("provider", strings.Replace(text, "endpoint:", "dryRun: true\n    endpoint:", 1))
	g.must(err)
	g.must(p.Serving(g.ctx, 30*time.Second))
	g.eventually("the nodes to be known", 40*time.Second, func() error {
		rng, err := g.group("runners")
		if err == nil && rng.Status.Ready != 2 {
			err = fmt.Errorf("%d are ready", rng.Status.Ready)
		}
		return err
	})
	ca := g.CloudProvider()
	for what, err := range map[string]error{
		"increase": second(ca.NodeGroupIncreaseSize(g.ctx, &externalgrpc.NodeGroupIncreaseSizeRequest{Id: "runners", Delta: 1})),
		"decrease": second(ca.NodeGroupDecreaseTargetSize(g.ctx, &externalgrpc.NodeGroupDecreaseTargetSizeRequest{Id: "runners", Delta: -1})),
		"delete": second(ca.NodeGroupDeleteNodes(g.ctx, &externalgrpc.NodeGroupDeleteNodesRequest{
			Id: "runners", Nodes: []*externalgrpc.ExternalGrpcNode{{ProviderID: "aws:///a/" + amazon.All()[0].ID}},
		})),
	} {
		if status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%s: %v, want FailedPrecondition", what, err)
		}
	}
	time.Sleep(10 * time.Second)
	nodes, err := g.Kube.CoreV1().Nodes().List(g.ctx, metav1.ListOptions{})
	g.must(err)
	for _, node := range nodes.Items {
		for _, keys := range []map[string]string{node.Labels, node.Annotations} {
			for key := range keys {
				if strings.Contains(key, model.Prefix) || key == scaleDownDisabled {
					t.Errorf("node %s bears %s", node.Name, key)
				}
			}
		}
	}
	for operation := range amazon.Counts() {
		if !strings.HasPrefix(operation, "Describe") {
			t.Errorf("AWS was asked to %s", operation)
		}
	}
	if !strings.Contains(p.Log(), "dry run: the group would be resized to 3") {
		t.Error("it does not say what it would do")
	}
}

func second[T any](_ T, err error) error { return err }
