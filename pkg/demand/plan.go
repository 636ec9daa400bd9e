package demand

import (
	"slices"
	"strings"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Group is what a node group has for jobs, in runner slots.
type Group struct {
	ID model.GroupID
	// Labels are the runner labels of the group (annotation runner-labels).
	Labels []string
	// Slots a node has.
	Slots int
	// Held are slots of runners that are up and have no job yet; Free slots of
	// nodes that are up and Coming of nodes on their way have no runner.
	Held, Free, Coming int
	// Pods are runner pods that ask for the group and have no node yet.
	Pods int
	// Room is how many nodes more may be started.
	Room int
}

// Want is what jobs come to.
type Want struct {
	// Nodes are to be started beside those that are on their way.
	Nodes map[model.GroupID]int
	// Taken are the free slots of nodes that are up which jobs and pods will
	// take: those nodes are not idle for long.
	Taken map[model.GroupID]int
	// Jobs counts the queued jobs by the group that they are for, and by system.
	Jobs map[model.GroupID]map[System]int
	// Unmatched are the queued jobs that no group may run, ten of them at most;
	// UnmatchedBy is how many they are, by system.
	Unmatched   []Job
	UnmatchedBy map[System]int
}

// mostUnmatched bounds the jobs that are named.
const mostUnmatched = 10

// Plan spreads queued jobs, those that have waited longest first, over the
// groups that may run them: onto runners that wait for a job, then free slots,
// then nodes on their way, then nodes to be started. choose returns the best of
// several groups that could start a node for a key. Pods that wait for a node
// need one whatever is queued: they and the jobs are the same as far as their
// numbers agree. Room bounds what is started; what does not fit waits.
func Plan(jobs []Job, groups []Group, choose func(model.CacheKey, []model.GroupID) model.GroupID) Want {
	w := Want{
		Nodes: map[model.GroupID]int{}, Taken: map[model.GroupID]int{},
		Jobs: map[model.GroupID]map[System]int{}, UnmatchedBy: map[System]int{},
	}
	groups = slices.Clone(groups)
	unheld := make(map[model.GroupID]int, len(groups)) // jobs that no waiting runner serves
	take := func(g *Group) (took bool) {
		switch {
		case g.Free > 0:
			g.Free--
			w.Taken[g.ID]++
		case g.Coming > 0:
			g.Coming--
		case g.Room > 0:
			g.Room--
			w.Nodes[g.ID]++
			g.Coming += max(g.Slots, 1) - 1
		default:
			return false
		}
		return true
	}
	first := func(among []*Group, has func(*Group) bool) *Group {
		if at := slices.IndexFunc(among, has); at >= 0 {
			return among[at]
		}
		return nil
	}
	for _, j := range jobs {
		among := matching(j, groups)
		if len(among) == 0 {
			if w.UnmatchedBy[j.System]++; len(w.Unmatched) < mostUnmatched {
				w.Unmatched = append(w.Unmatched, j)
			}
			continue
		}
		g := first(among, func(g *Group) bool { return g.Held > 0 })
		if g != nil {
			g.Held--
		} else {
			if g = first(among, func(g *Group) bool { return g.Free > 0 }); g == nil {
				g = first(among, func(g *Group) bool { return g.Coming > 0 })
			}
			if g == nil {
				g = best(j, among, choose)
			}
			unheld[g.ID]++
			take(g)
		}
		if w.Jobs[g.ID] == nil {
			w.Jobs[g.ID] = map[System]int{}
		}
		w.Jobs[g.ID][j.System]++
	}
	for i := range groups {
		g := &groups[i]
		for range g.Pods - unheld[g.ID] {
			if !take(g) {
				break
			}
		}
	}
	return w
}

// best returns the group to start a node in: of those with room the best, else
// the first.
func best(j Job, among []*Group, choose func(model.CacheKey, []model.GroupID) model.GroupID) *Group {
	var room []model.GroupID
	for _, g := range among {
		if g.Room > 0 {
			room = append(room, g.ID)
		}
	}
	if len(room) == 0 {
		return among[0]
	}
	id := room[0]
	if len(room) > 1 {
		id = choose(j.Key, room)
	}
	for _, g := range among {
		if g.ID == id {
			return g
		}
	}
	return among[0]
}

func matching(j Job, groups []Group) (among []*Group) {
	for i := range groups {
		if Matches(j, groups[i].Labels) {
			among = append(among, &groups[i])
		}
	}
	return among
}

// Matches says whether a runner with these labels may take a job: it has every
// label that the job demands, on GitHub whatever their case. A job that demands
// none matches no group: nothing says that it is for the cluster at all.
func Matches(j Job, labels []string) bool {
	if len(j.Labels) == 0 {
		return false
	}
	same := func(a, b string) bool { return a == b }
	if j.System == GitHub {
		same = strings.EqualFold
	}
	return !slices.ContainsFunc(j.Labels, func(want string) bool {
		return !slices.ContainsFunc(labels, func(have string) bool { return same(want, have) })
	})
}
