package controller

import (
	"fmt"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
)

// queue has GitHub tell of jobs that were queued for runners labelled linux.
func (l *lab) queue(state demand.State, n int) {
	l.t.Helper()
	for i := range n {
		j := demand.Job{
			ID: demand.JobID(fmt.Sprint("github/acme/shop/", i)), System: demand.GitHub, Scope: "acme/shop", Labels: []string{"self-hosted", "linux"},
			Key: "github/acme/shop", State: state, At: time.Now(), QueuedAt: time.Now(),
		}
		if !l.world.JobObserved(j) {
			l.t.Fatalf("job %d was not taken", i)
		}
	}
}

func linux(annotations ...string) []model.NodeGroup {
	return []model.NodeGroup{group(runners, append([]string{"runner-labels", "self-hosted,linux,x64"}, annotations...)...)}
}

func (l *lab) pending(source string) float64 {
	return l.metric(l.metrics.JobsPending.WithLabelValues(string(runners), source))
}

// Nodes start when jobs are queued, as many as they need, and cluster-autoscaler
// takes them over when their pods come.
func TestQueuedJobsStartNodes(t *testing.T) {
	experiment(t, linux("jobs-per-node", "2"), func(t *testing.T, l *lab) {
		l.cluster.state.Lock()
		l.cluster.slots = 2
		l.cluster.state.Unlock()
		l.start()
		l.refresh()
		began := time.Now()
		l.queue(demand.Queued, 5)
		l.queue(demand.Queued, 5) // told twice
		l.within(time.Second, "a launch", func() bool { return l.cloud.desired(runners) == 3 })
		if took := time.Since(began); took > 200*time.Millisecond {
			t.Errorf("%s from the first message to the launch", took)
		}
		l.within(time.Second, "the gauge", func() bool { return l.pending("github") == 5 })
		time.Sleep(5 * time.Second)
		for range 5 {
			l.cluster.job("repo", 10*time.Minute, "")
		}
		l.settle()
		l.refresh()
		l.must(l.increase(runners, 3))
		l.within(2*time.Minute, "the pods to run", func() bool {
			n := 0
			for _, node := range l.ready() {
				n += l.cluster.jobs(node.Name)
			}
			return n == 5
		})
		l.queue(demand.Running, 5)
		l.always(5*time.Minute, "no more than were needed", func() bool { return l.cloud.launches() == 3 && l.view(runners).Target == 3 })
		if l.pending("github") != 0 {
			t.Errorf("%v jobs are pending", l.pending("github"))
		}
	})
}

// Nodes start when runners are created, before their pods; a job that is seen
// as event, as runner and as pod is one job; a runner that never gets a pod is
// no reason for long.
func TestRunnersStartNodes(t *testing.T) {
	experiment(t, linux("max-idle", "2m"), func(t *testing.T, l *lab) {
		l.start()
		l.refresh()
		coming := func(n int) {
			for i := range 2 {
				since := time.Now()
				if i >= n {
					since = time.Time{}
				}
				l.world.RunnerComing(runners, fmt.Sprint("runner-", i), since)
			}
		}
		coming(2)
		l.within(time.Second, "a launch", func() bool { return l.cloud.desired(runners) == 2 })
		l.queue(demand.Queued, 2)
		coming(2)
		time.Sleep(time.Second)
		coming(0)
		for range 2 {
			l.cluster.job("repo", 10*time.Minute, "")
		}
		l.settle()
		l.refresh()
		l.must(l.increase(runners, 2))
		l.queue(demand.Running, 2)
		l.within(2*time.Minute, "two busy nodes", func() bool {
			return len(l.ready()) == 2 && l.cluster.jobs(l.ready()[0].Name)+l.cluster.jobs(l.ready()[1].Name) == 2
		})
		if l.cloud.launches() != 2 {
			t.Errorf("%d launched for two jobs", l.cloud.launches())
		}
		coming(1) // for ever
		l.within(5*time.Second, "a third", func() bool { return l.cloud.desired(runners) == 3 })
		l.always(30*time.Minute, "no fourth", func() bool { return l.cloud.launches() <= 3 })
	})
}

// Jobs that are cancelled before their pods came leave ordinary idle nodes.
func TestCancelledJobsLeaveIdleNodes(t *testing.T) {
	experiment(t, linux("max-idle", "2m"), func(t *testing.T, l *lab) {
		l.start()
		l.queue(demand.Queued, 3)
		l.within(time.Second, "a launch", func() bool { return l.cloud.desired(runners) == 3 })
		l.queue(demand.Ended, 3)
		for range 30 { // loops of cluster-autoscaler, which is told of them once they are Ready
			time.Sleep(10 * time.Second)
			l.refresh()
		}
		if l.view(runners).Target != 3 || l.cloud.launches() != 3 {
			t.Errorf("told of %d, launched %d", l.view(runners).Target, l.cloud.launches())
		}
		// The plan releases them by halves; nobody removes them here.
		l.within(5*time.Minute, "release", func() bool { return len(l.unprotected()) >= 2 })
	})
}

// A node that waits for a queued job is not released meanwhile.
func TestNodesAreKeptForQueuedJobs(t *testing.T) {
	experiment(t, linux("max-idle", "1m"), func(t *testing.T, l *lab) {
		l.start()
		l.fleet(3)
		l.queue(demand.Queued, 2)
		l.within(2*time.Minute, "release of one", func() bool { return len(l.unprotected()) == 1 })
		for _, n := range l.ready() {
			if !n.Marks.Protected {
				l.must(l.remove(runners, n))
			}
		}
		l.within(time.Minute, "the end of it", func() bool { return len(l.ready()) == 2 })
		l.always(5*time.Minute, "two nodes for two jobs", func() bool { return len(l.unprotected()) == 0 && len(l.ready()) == 2 })
		if l.cloud.launches() != 3 {
			t.Errorf("%d launched, with free slots", l.cloud.launches())
		}
		l.queue(demand.Ended, 2)
		l.within(time.Minute, "release of another", func() bool { return len(l.unprotected()) == 1 })
	})
}

// The parked node that knows a queued job's pipeline is resumed for it.
func TestQueuedJobResumesItsNode(t *testing.T) {
	experiment(t, linux("park", "stop", "max-idle", "1m"), func(t *testing.T, l *lab) {
		withEngines(l)
		l.start()
		nodes := l.fleet(2)
		for i, key := range []model.CacheKey{"github/acme/other/ci.yml", "github/acme/shop/ci.yml"} {
			l.cluster.job(key, 20*time.Second, nodes[i].Name)
		}
		l.within(10*time.Minute, "release", func() bool { return len(l.unprotected()) == 2 })
		l.must(l.remove(runners, nodes...))
		for _, n := range nodes {
			l.phase(n.ID, model.PhaseParked)
		}
		l.refresh()
		l.queue(demand.Queued, 1)
		l.within(30*time.Second, "its node", func() bool { return l.cloud.machines(runners)[nodes[1].ID].State == model.InstanceRunning })
		l.always(time.Minute, "the other stays", func() bool { return l.cloud.machines(runners)[nodes[0].ID].State == model.InstanceStopped })
		if l.cloud.launches() != 2 {
			t.Errorf("%d launched, want the first 2", l.cloud.launches())
		}
	})
}

// Annotations bound what is started for queued jobs.
func TestPrescaleIsBounded(t *testing.T) {
	for _, tt := range []struct {
		annotations []string
		nodes       int
	}{
		{[]string{"prescale", "off"}, 0},
		{[]string{"prescale-max", "2"}, 2},
		{nil, 10}, // the group's maximum
		{[]string{"role", "plain"}, 0},
		{[]string{"runner-labels", "windows"}, 0},
	} {
		t.Run(fmt.Sprint(tt.annotations), func(t *testing.T) {
			experiment(t, linux(tt.annotations...), func(t *testing.T, l *lab) {
				l.start()
				l.queue(demand.Queued, 15)
				l.within(5*time.Second, "a launch", func() bool { return l.cloud.desired(runners) == tt.nodes })
				l.always(10*time.Second, "no more", func() bool { return l.cloud.desired(runners) == tt.nodes })
			})
		})
	}
}

// A restart forgets what was queued, and not what was started for it.
func TestQueuedJobsAfterARestart(t *testing.T) {
	experiment(t, linux(), func(t *testing.T, l *lab) {
		l.start()
		l.queue(demand.Queued, 4)
		l.within(time.Second, "a launch", func() bool { return l.cloud.desired(runners) == 4 })
		l.restart()
		if !l.world.JobsListed(demand.Listing{System: demand.GitHub, Scope: "acme/shop", At: time.Now(), Jobs: []demand.Job{
			{ID: "github/acme/shop/0", System: demand.GitHub, Scope: "acme/shop", Labels: []string{"linux"}, State: demand.Queued},
			{ID: "github/acme/shop/1", System: demand.GitHub, Scope: "acme/shop", Labels: []string{"linux"}, State: demand.Queued},
		}}) {
			t.Fatal("the listing was not taken")
		}
		l.within(5*time.Second, "two jobs", func() bool { return l.pending("github") == 2 })
		l.always(time.Minute, "nothing launched twice", func() bool { return l.cloud.launches() <= 4 && l.cloud.desired(runners) == 4 })
	})
}

// Runners without a job are slots: no node is started for a job that one of them
// will take, and none keeps its node busy.
func TestWaitingRunnersAreSlots(t *testing.T) {
	experiment(t, linux("max-idle", "1m"), func(t *testing.T, l *lab) {
		l.start()
		node := l.fleet(1)[0]
		runner := model.Pod{Namespace: "ci", Name: "runner", UID: "runner", Kind: model.PodRunner, Key: "arc/linux", Node: node.Name, Created: time.Now(), Waiting: true}
		l.world.PodChanged(runner)
		l.settle()
		l.queue(demand.Queued, 1)
		l.always(30*time.Second, "no launch", func() bool { return l.cloud.desired(runners) == 1 })
		runner.Waiting, runner.Job = false, "github/acme/shop/ci.yml"
		l.world.PodChanged(runner)
		l.within(5*time.Second, "the job to be its", func() bool { return l.pending("github") == 0 })
		l.wantBusy(node)
		runner.Waiting, runner.Job = true, ""
		l.world.PodChanged(runner)
		l.released(3*time.Minute, node.Name)
	})
}

func (l *lab) wantBusy(node model.Node) {
	l.t.Helper()
	if err := l.remove(runners, node); err == nil {
		l.t.Error("a node that runs a job may be removed")
	}
}

// A replica that does not lead takes nothing, and one that is behind not
// everything.
func TestMessagesAreBounded(t *testing.T) {
	w := NewWorld(linux())
	if w.JobObserved(demand.Job{ID: "1"}) || w.JobsListed(demand.Listing{}) {
		t.Error("taken without an owner")
	}
	w.take()
	n := 0
	for n <= mostJobs && w.JobObserved(demand.Job{ID: "1"}) {
		n++
	}
	if n != mostJobs {
		t.Errorf("%d taken, want %d", n, mostJobs)
	}
	if jobs, _ := w.takeJobs(); len(jobs) != mostJobs || !w.JobObserved(demand.Job{ID: "1"}) {
		t.Errorf("%d handed over", len(jobs))
	}
}
