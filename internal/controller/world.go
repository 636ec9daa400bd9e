package controller

import (
	"cmp"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/demand"
	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// World receives what the watches see and hands it to the owner of the fleet
// in batches. Only the newest state of each object is kept, so its memory is
// bounded by the cluster and a slow owner never blocks a watch; before there
// is an owner (a stand-by waits for weeks) what is gone leaves no trace. Its
// methods are safe for concurrent use.
type World struct {
	mu       sync.Mutex
	owned    bool // take has been called
	declared map[model.GroupID]model.NodeGroup
	seen     map[model.GroupID]map[string]string // annotations, the newest
	keys     map[model.GroupID][]string          // cache-keys of each group
	// slots are the jobs-per-node of each group, parks whether it parks: by its
	// id, and by the value of its nodes' label.
	slots       map[string]int
	parks       map[string]bool
	nodes       map[model.NodeName]nodeChange
	pods        map[podKey]podChange
	uses        map[model.NodeName]model.EngineUse
	jobs        []demand.Job
	listings    []demand.Listing
	coming      map[model.GroupID]map[string]time.Time // runners without a pod
	annotations map[model.GroupID]map[string]string
	wake        chan struct{}
}

type nodeChange struct {
	node model.Node
	gone bool
}

// podKey names what a pod is to us: one that becomes something else, because
// its labels were changed, ends and begins.
type podKey struct {
	uid  string
	kind model.PodKind
}

type podChange struct {
	pod  model.Pod
	gone bool
}

// NewWorld returns a World in which nothing has been seen yet.
func NewWorld(groups []model.NodeGroup) *World {
	w := &World{
		seen:        map[model.GroupID]map[string]string{},
		nodes:       map[model.NodeName]nodeChange{},
		pods:        map[podKey]podChange{},
		uses:        map[model.NodeName]model.EngineUse{},
		coming:      map[model.GroupID]map[string]time.Time{},
		annotations: map[model.GroupID]map[string]string{},
		wake:        make(chan struct{}, 1),
	}
	w.SetGroups(groups)
	return w
}

// SetGroups replaces the declared groups, whose annotations say what makes a
// cache key.
func (w *World) SetGroups(groups []model.NodeGroup) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.declared = make(map[model.GroupID]model.NodeGroup, len(groups))
	w.keys = make(map[model.GroupID][]string, len(groups))
	w.slots = make(map[string]int, len(groups))
	w.parks = make(map[string]bool, len(groups))
	for _, g := range groups {
		w.declared[g.ID] = g
		w.readKeys(g.ID)
	}
}

func (w *World) readKeys(id model.GroupID) {
	if spec, ok := w.declared[id]; ok {
		settings, _ := nodegroups.Interpret(spec, w.seen[id])
		w.keys[id] = settings.CacheKeys
		for _, name := range []string{string(id), model.GroupLabel(id)} {
			w.slots[name] = settings.JobsPerNode
			w.parks[name] = settings.Park == nodegroups.ParkStop
		}
	}
}

// KeysFor returns the labels or annotations that make a job's cache key in a
// group; none means the default.
func (w *World) KeysFor(group model.GroupID) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.keys[group]
}

// JobsPerNode returns how many runner pods a node of the group takes at a time,
// zero when the group is not known. The group may be named by its label's value.
func (w *World) JobsPerNode(group model.GroupID) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.slots[string(group)]
}

// Patience returns for how long a job of the group is better off waiting for a
// warm node than taking another: what a resume takes or, in a group that does
// not park, a launch, as long as nothing was learnt.
func (w *World) Patience(group model.GroupID) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.parks[string(group)] {
		return usualResume
	}
	return usualBoot
}

func (w *World) changed() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// NodeChanged notes the present state of a Node.
func (w *World) NodeChanged(n model.Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes[n.Name] = nodeChange{node: n}
	w.changed()
}

// NodeGone notes that a Node, last seen as n, was deleted.
func (w *World) NodeGone(n model.Node) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.owned {
		delete(w.nodes, n.Name)
		return
	}
	w.nodes[n.Name] = nodeChange{node: n, gone: true}
	w.changed()
}

// PodChanged notes the present state of a pod.
func (w *World) PodChanged(p model.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods[podKey{p.UID, p.Kind}] = podChange{pod: p}
	w.changed()
}

// PodGone notes that a pod was deleted.
func (w *World) PodGone(p model.Pod) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.owned {
		delete(w.pods, podKey{p.UID, p.Kind})
		return
	}
	w.pods[podKey{p.UID, p.Kind}] = podChange{pod: p, gone: true}
	w.changed()
}

// EngineSampled notes what the newest samples of a node's engine come to.
func (w *World) EngineSampled(u model.EngineUse) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if before := w.uses[u.Node]; before.Wiped && before.Pod == u.Pod {
		u.Wiped = true // the owner has not been told yet
	}
	w.uses[u.Node] = u
	w.changed()
}

// AnnotationsChanged notes the annotations of a group's RunnerNodeGroup.
func (w *World) AnnotationsChanged(group model.GroupID, annotations map[string]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.annotations[group] = annotations
	w.seen[group] = annotations
	w.readKeys(group)
	w.changed()
}

// mostJobs bounds the messages about jobs that wait for the owner.
const mostJobs = 10000

// JobObserved takes a message of a CI system about a job. It returns false when
// nobody takes it in now: this process does not lead, or too many wait.
func (w *World) JobObserved(j demand.Job) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.owned || len(w.jobs) >= mostJobs {
		return false
	}
	w.jobs = append(w.jobs, j)
	w.changed()
	return true
}

// JobsListed takes what a CI system lists as not ended, on the same terms.
func (w *World) JobsListed(l demand.Listing) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.owned || len(w.listings) >= mostJobs/100 {
		return false
	}
	w.listings = append(w.listings, l)
	w.changed()
	return true
}

// RunnerComing notes when a runner was created that asks for the group and has no
// pod yet; zero: no more.
func (w *World) RunnerComing(group model.GroupID, runner string, since time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.coming[group] == nil {
		w.coming[group] = map[string]time.Time{}
	}
	if w.coming[group][runner] = since; since.IsZero() {
		delete(w.coming[group], runner)
	}
	w.changed()
}

// runnersComing returns when the runners without a pod were created, by group.
func (w *World) runnersComing() map[model.GroupID][]time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	coming := make(map[model.GroupID][]time.Time, len(w.coming))
	for group, runners := range w.coming {
		coming[group] = slices.Collect(maps.Values(runners))
	}
	return coming
}

// takeJobs returns what CI systems told since the last call, in that order.
func (w *World) takeJobs() (jobs []demand.Job, listings []demand.Listing) {
	w.mu.Lock()
	defer w.mu.Unlock()
	jobs, listings = w.jobs, w.listings
	w.jobs, w.listings = nil, nil
	return jobs, listings
}

// takeUses returns what was sampled of engines since the last call.
func (w *World) takeUses() map[model.NodeName]model.EngineUse {
	w.mu.Lock()
	defer w.mu.Unlock()
	uses := w.uses
	w.uses = map[model.NodeName]model.EngineUse{}
	return uses
}

// take returns what has changed since the last call, in a fixed order.
func (w *World) take() (nodes []nodeChange, pods []podChange, annotations map[model.GroupID]map[string]string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.owned = true
	for _, n := range w.nodes {
		nodes = append(nodes, n)
	}
	for _, p := range w.pods {
		pods = append(pods, p)
	}
	annotations = w.annotations
	w.nodes, w.pods = map[model.NodeName]nodeChange{}, map[podKey]podChange{}
	w.annotations = map[model.GroupID]map[string]string{}
	slices.SortFunc(nodes, func(a, b nodeChange) int { return cmp.Compare(a.node.Name, b.node.Name) })
	ended := func(p podChange) int {
		if p.gone {
			return 0 // what it was ends before what it is begins
		}
		return 1
	}
	slices.SortFunc(pods, func(a, b podChange) int {
		return cmp.Or(cmp.Compare(a.pod.UID, b.pod.UID), cmp.Compare(ended(a), ended(b)), cmp.Compare(a.pod.Kind, b.pod.Kind))
	})
	return nodes, pods, annotations
}
