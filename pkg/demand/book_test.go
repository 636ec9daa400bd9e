package demand

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
)

var morning = time.Date(2026, 1, 5, 8, 0, 0, 0, time.UTC)

func at(seconds int) time.Time { return morning.Add(time.Duration(seconds) * time.Second) }

func message(id string, state State, seconds int) Job {
	return Job{ID: JobID(id), System: GitHub, Scope: "acme/shop", Labels: []string{"linux"}, Key: "k", State: state, At: at(seconds)}
}

func ids(jobs []Job) (out []string) {
	for _, j := range jobs {
		out = append(out, string(j.ID))
	}
	return out
}

func (b *Book) wants(t *testing.T, now time.Time, want ...string) {
	t.Helper()
	if got := ids(b.Queued(now)); !slices.Equal(got, want) {
		t.Errorf("queued are %q, want %q", got, want)
	}
}

func TestBook(t *testing.T) {
	b := NewBook()
	for i, step := range []struct {
		job     Job
		changed bool
		queued  []string
	}{
		{message("b", Queued, 1), true, []string{"b"}},
		{message("b", Queued, 1), false, []string{"b"}},
		{message("a", Running, 2), true, []string{"b"}}, // its first event was lost
		{message("a", Queued, 0), false, []string{"b"}}, // or late
		{message("c", Queued, 3), true, []string{"b", "c"}},
		{message("c", Ended, 4), true, []string{"b"}}, // cancelled while it waited
		{message("c", Running, 4), false, []string{"b"}},
		{message("b", Running, 5), true, nil},
		{message("b", Ended, 6), true, nil},
		{message("b", Queued, 1), false, nil},
	} {
		if changed := b.Observe(step.job, at(10+i)); changed != step.changed {
			t.Errorf("step %d: changed %v", i, changed)
		}
		b.wants(t, at(10+i), step.queued...)
	}
}

func TestBookForgets(t *testing.T) {
	b := NewBook()
	b.Observe(message("lost", Queued, 0), at(0))
	b.Observe(message("done", Ended, 0), at(0))
	b.wants(t, at(3599), "lost")
	b.Observe(message("again", Queued, 0), at(1800))
	b.wants(t, at(3660), "again")
	if b.Forgotten != 1 || len(b.jobs) != 1 {
		t.Errorf("%d forgotten, %d remembered", b.Forgotten, len(b.jobs))
	}
	// Clocks of others are not to be trusted.
	ahead := message("ahead", Queued, 0)
	ahead.QueuedAt = at(100000)
	b.Observe(ahead, at(3660))
	if q := b.Queued(at(3660)); q[len(q)-1].QueuedAt.After(at(3660)) {
		t.Errorf("a job from the future: %+v", q)
	}
}

func TestBookIsBounded(t *testing.T) {
	b := NewBook()
	for i := range MaxJobs + 5 {
		b.Observe(message(fmt.Sprint(i), Queued, 0), at(0))
	}
	if b.Refused != 5 || len(b.Queued(at(0))) != MaxJobs {
		t.Errorf("%d refused, %d queued", b.Refused, len(b.Queued(at(0))))
	}
	if !b.Observe(message("1", Ended, 1), at(1)) {
		t.Error("a job that is known is not told of any more")
	}
	if b.Observe(message("new", Queued, 7200), at(7200)); b.Refused != 5 || len(b.jobs) != 1 {
		t.Errorf("%d refused, %d remembered, after two hours", b.Refused, len(b.jobs))
	}
}

func TestListing(t *testing.T) {
	b := NewBook()
	other := message("elsewhere", Queued, 0)
	other.Scope = "acme/lib"
	b.Observe(other, at(0))
	b.Observe(message("ended", Queued, 0), at(0))
	b.Observe(message("waits", Queued, 1), at(1))
	b.Observe(message("later", Queued, 30), at(30))
	l := Listing{System: GitHub, Scope: "acme/shop", At: at(20), Jobs: []Job{message("waits", Queued, 1), message("unheard", Queued, 2), message("runs", Running, 3)}}
	if !b.Reconcile(l, at(31)) {
		t.Error("nothing changed")
	}
	b.wants(t, at(31), "elsewhere", "waits", "later", "unheard")
	if b.Reconcile(l, at(32)) {
		t.Error("the same listing changed something")
	}
}

// A runner that is seen to have picked up a job has one of its key, until a
// message says which.
func TestPickedUp(t *testing.T) {
	b := NewBook()
	b.Observe(message("1", Queued, 1), at(1))
	b.Observe(message("2", Queued, 2), at(2))
	if b.PickedUp("runner", "other", at(3)) || !b.PickedUp("runner", "k", at(3)) || b.PickedUp("runner", "k", at(4)) {
		t.Error("picked up by a wrong key, not, or twice")
	}
	b.wants(t, at(4), "2")
	really := message("2", Running, 5)
	really.Runner = "runner"
	b.Observe(really, at(5))
	b.wants(t, at(5), "1")
	if b.PickedUp("runner", "k", at(6)) {
		t.Error("what a message told is guessed anew")
	}
	b.PickedUp("second", "k", at(7))
	b.Observe(func() Job { j := message("1", Running, 8); j.Runner = "second"; return j }(), at(8)) // the guess was right
	b.wants(t, at(8))
	b.Observe(message("3", Queued, 9), at(9))
	b.PickedUp("third", "k", at(10))
	b.Reconcile(Listing{System: GitHub, Scope: "acme/shop", At: at(11), Jobs: []Job{message("3", Queued, 9)}}, at(11))
	b.wants(t, at(11), "3")
}

// A runner that is up and of which nobody says what it does has one of the jobs
// that it may run, unless there is none from before it.
func TestTook(t *testing.T) {
	b := NewBook()
	b.Observe(func() Job { j := message("1", Queued, 1); j.QueuedAt = at(1); return j }(), at(1))
	b.Observe(func() Job { j := message("2", Queued, 9); j.QueuedAt = at(9); return j }(), at(9))
	if b.Took("r", []string{"windows"}, at(20), at(20)) || b.Took("r", []string{"linux"}, at(0), at(20)) {
		t.Error("a job that it cannot run, or that came after it")
	}
	if !b.Took("r", []string{"linux"}, at(5), at(20)) || b.Took("r", []string{"linux"}, at(20), at(20)) || !b.Runs("r") || b.Runs("s") {
		t.Error("not taken, or twice")
	}
	b.wants(t, at(20), "2")
	b.Queued(at(20 + 3700))
	if b.Runs("r") || len(b.runners)+len(b.guesses)+len(b.jobs) > 0 {
		t.Errorf("remembered are %v, %v, %v", b.runners, b.guesses, b.jobs)
	}
}

// Whatever becomes of the messages about jobs, one listing ends in the truth; and
// without any loss the messages alone do, in any order.
func TestAnyOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		jobs := rapid.IntRange(1, 12).Draw(t, "jobs")
		lossless := rapid.Bool().Draw(t, "lossless")
		var sent []Job
		truth := map[JobID]State{}
		for i := range jobs {
			id := fmt.Sprint("j", i)
			last := State(rapid.IntRange(1, 3).Draw(t, "state"))
			truth[JobID(id)] = last
			for s := Queued; s <= last; s++ {
				m := message(id, s, 10*i+int(s))
				m.QueuedAt = at(10*i + 1)
				if s > Queued {
					m.Runner = "runner-" + id
				}
				copies := rapid.IntRange(0, 3).Draw(t, "copies")
				if lossless {
					copies = max(copies, 1)
				}
				for range copies {
					sent = append(sent, m)
				}
			}
		}
		b, now := NewBook(), at(1000)
		for _, i := range rapid.Permutation(indexes(len(sent))).Draw(t, "order") {
			now = now.Add(time.Second)
			b.Observe(sent[i], now)
			if !lossless && rapid.IntRange(0, 5).Draw(t, "picked") == 0 {
				b.PickedUp(fmt.Sprint("runner-j", rapid.IntRange(0, 11).Draw(t, "runner")), "k", now)
			}
		}
		if !lossless {
			l := Listing{System: GitHub, Scope: "acme/shop", At: now}
			for id, s := range truth {
				if s != Ended {
					m := message(string(id), s, 0)
					if s == Running {
						m.Runner = "runner-" + string(id)
					}
					l.Jobs = append(l.Jobs, m)
				}
			}
			slices.SortFunc(l.Jobs, older)
			b.Reconcile(l, now)
		}
		queued := map[JobID]bool{}
		for _, j := range b.Queued(now) {
			queued[j.ID] = true
		}
		for id, s := range truth {
			if queued[id] != (s == Queued) {
				t.Fatalf("%s is in state %d, and queued %v", id, s, queued[id])
			}
		}
		if len(queued) > jobs {
			t.Fatalf("%d queued of %d jobs", len(queued), jobs)
		}
	})
}

func indexes(n int) (out []int) {
	for i := range n {
		out = append(out, i)
	}
	return out
}

func TestMatches(t *testing.T) {
	for _, tt := range []struct {
		system      System
		job, runner []string
		want        bool
	}{
		{GitHub, []string{"self-hosted", "Linux"}, []string{"self-hosted", "linux", "x64"}, true},
		{GitHub, []string{"self-hosted", "gpu"}, []string{"self-hosted", "linux"}, false},
		{GitLab, []string{"Linux"}, []string{"linux"}, false},
		{GitLab, []string{"linux"}, []string{"linux", "docker"}, true},
		{Buildkite, []string{"queue=default"}, []string{"queue=default"}, true},
		{GitHub, nil, []string{"linux"}, false},
		{GitHub, []string{"linux"}, nil, false},
		{GitHub, []string{"ünïcode"}, []string{"ÜNÏCODE"}, true},
	} {
		if got := Matches(Job{System: tt.system, Labels: tt.job}, tt.runner); got != tt.want {
			t.Errorf("%s job %q on runner %q: %v", tt.system, tt.job, tt.runner, got)
		}
	}
}

func queued(n int, labels ...string) (jobs []Job) {
	for i := range n {
		jobs = append(jobs, Job{ID: JobID(fmt.Sprint(i)), System: GitHub, Labels: labels, State: Queued, QueuedAt: at(i)})
	}
	return jobs
}

func TestPlan(t *testing.T) {
	linux := []string{"linux"}
	for _, tt := range []struct {
		name      string
		jobs      []Job
		groups    []Group
		nodes     map[model.GroupID]int
		unmatched int
	}{
		{"nothing", nil, []Group{{ID: "g", Labels: linux, Slots: 1, Room: 5}}, nil, 0},
		{"a node a job", queued(3, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Room: 5}}, map[model.GroupID]int{"g": 3}, 0},
		{"two jobs a node", queued(3, "linux"), []Group{{ID: "g", Labels: linux, Slots: 2, Room: 5}}, map[model.GroupID]int{"g": 2}, 0},
		{"no more than there is room for", queued(9, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Room: 5}}, map[model.GroupID]int{"g": 5}, 0},
		{"free slots", queued(3, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Free: 2, Room: 5}}, map[model.GroupID]int{"g": 1}, 0},
		{"nodes on their way", queued(3, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Coming: 3, Room: 5}}, nil, 0},
		{"runners that wait", queued(3, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Held: 2, Room: 5}}, map[model.GroupID]int{"g": 1}, 0},
		{"pods are the jobs", queued(3, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Pods: 3, Room: 5}}, map[model.GroupID]int{"g": 3}, 0},
		{"more pods than jobs", queued(1, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Pods: 3, Room: 5}}, map[model.GroupID]int{"g": 3}, 0},
		{"pods alone", nil, []Group{{ID: "g", Slots: 1, Pods: 3, Free: 1, Coming: 1, Room: 5}}, map[model.GroupID]int{"g": 1}, 0},
		{"pods beside jobs for runners that wait", queued(2, "linux"), []Group{{ID: "g", Labels: linux, Slots: 1, Held: 2, Pods: 1, Room: 5}}, map[model.GroupID]int{"g": 1}, 0},
		{"nobody's", queued(3, "windows"), []Group{{ID: "g", Labels: linux, Slots: 1, Room: 5}}, nil, 3},
		{"the best of two", queued(2, "linux"), []Group{{ID: "a", Labels: linux, Slots: 1, Room: 5}, {ID: "b", Labels: linux, Slots: 1, Room: 1}}, map[model.GroupID]int{"a": 1, "b": 1}, 0},
		{"what is free before what is best", queued(1, "linux"), []Group{{ID: "a", Labels: linux, Slots: 1, Free: 1, Room: 5}, {ID: "b", Labels: linux, Slots: 1, Room: 1}}, nil, 0},
		{"no room at all", queued(2, "linux"), []Group{{ID: "a", Labels: linux, Slots: 1}}, nil, 0},
		{"a group without slots has one", queued(2, "linux"), []Group{{ID: "a", Labels: linux, Room: 3}}, map[model.GroupID]int{"a": 2}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := slices.Clone(tt.groups)
			w := Plan(tt.jobs, tt.groups, func(_ model.CacheKey, among []model.GroupID) model.GroupID { return among[len(among)-1] })
			for _, g := range tt.groups {
				if w.Nodes[g.ID] != tt.nodes[g.ID] {
					t.Errorf("%d nodes of %s, want %d", w.Nodes[g.ID], g.ID, tt.nodes[g.ID])
				}
			}
			if w.UnmatchedBy[GitHub] != tt.unmatched || len(w.Unmatched) != tt.unmatched {
				t.Errorf("%v unmatched", w.UnmatchedBy)
			}
			for i := range before {
				if before[i].Free != tt.groups[i].Free || before[i].Room != tt.groups[i].Room {
					t.Error("its input was changed")
				}
			}
		})
	}
}

// Nodes never exceed what jobs and pods need, nor the room; and where there is
// room, everything that waits has a slot.
func TestPlanIsExact(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := Group{
			ID: "g", Labels: []string{"linux"}, Slots: rapid.IntRange(1, 4).Draw(t, "slots"), Held: rapid.IntRange(0, 3).Draw(t, "held"),
			Free: rapid.IntRange(0, 5).Draw(t, "free"), Coming: rapid.IntRange(0, 5).Draw(t, "coming"),
			Pods: rapid.IntRange(0, 9).Draw(t, "pods"), Room: rapid.IntRange(0, 9).Draw(t, "room"),
		}
		n := rapid.IntRange(0, 12).Draw(t, "jobs")
		w := Plan(queued(n, "linux"), []Group{g}, nil)
		need := max(max(n-g.Held, 0), g.Pods) - g.Free - g.Coming
		want := min(max((need+g.Slots-1)/g.Slots, 0), g.Room)
		if w.Nodes["g"] != want {
			t.Fatalf("%+v with %d jobs: %d nodes, want %d", g, n, w.Nodes["g"], want)
		}
	})
}

// A listing that leaves a job out, be it because it was made while the job's run
// went from one list to another, is corrected by the next.
func TestListingCorrectsAListing(t *testing.T) {
	b := NewBook()
	job := message("a", Queued, 0)
	b.Observe(job, at(1))
	listed := func(seconds int, jobs ...Job) {
		b.Reconcile(Listing{System: GitHub, Scope: "acme/shop", At: at(seconds), Jobs: jobs}, at(seconds))
	}
	listed(10)
	b.wants(t, at(11))
	listed(70, job)
	b.wants(t, at(71), "a")
	// An event is more than that: a listing that was made before it is late.
	b.Observe(message("a", Ended, 80), at(80))
	listed(81, job)
	b.wants(t, at(82))
}
