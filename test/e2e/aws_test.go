package e2e

import (
	"errors"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/hearth-ci/hearth/pkg/model"
)

// TestAWS: on Auto Scaling groups a job gets a node, its idle node is parked in
// standby, comes back for the next job of its key and is terminated when
// parking is off. All other tests run on this backend too, when
// HEARTH_E2E_BACKEND is "aws".
func TestAWS(t *testing.T) {
	g := newGroundOn(t, true)
	amazon := g.cloud.(*amazon)
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
