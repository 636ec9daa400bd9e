package placement

import (
	"cmp"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

const (
	// seenFor is how long a job that was seen to start makes its node warm
	// without a label saying so: longer than the leader takes to set one.
	seenFor = 2 * time.Minute
	// most bounds the nodes that an answer names, examined those that are
	// compared for it; without a bound a key that is warm everywhere would make
	// every answer slow.
	most, examined = 5, 32
)

// IndexConfig is what an Index needs. All fields are required.
type IndexConfig struct {
	// Label returns the name of the label of nodes that are warm for a key,
	// WarmLabels which of a node's labels are such.
	Label      func(model.CacheKey) string
	WarmLabels func(labels map[string]string) []string
	// Group returns the node group of a node by its labels, empty when it has
	// none, and Slots how many runner pods a node of a group takes at a time.
	Group func(labels map[string]string) model.GroupID
	Slots func(model.GroupID) int
	// Patience is how long every warm node may have been full before a job is
	// better placed elsewhere: what a resume takes.
	Patience time.Duration
	Now      func() time.Time
}

// Index knows which nodes are warm for which key, and which of them have room.
// It knows it from the nodes' labels and from the jobs that were seen to start,
// so that it is the same on every replica. It is told by a feed and may be
// asked meanwhile.
type Index struct {
	cfg  IndexConfig
	keys *scoring.Keys // nothing is learnt of them here: all are worth the same

	mu      sync.Mutex
	nodes   map[model.NodeName]*node
	warm    map[string]map[*node]time.Time // by label; when its job was seen, zero when labelled
	pods    map[string]model.NodeName      // the unfinished runner pods, by UID
	perNode map[model.NodeName]int         // their number
	free    scoring.Stock                  // of the nodes with room
}

type node struct {
	name      model.NodeName
	uid       string
	group     model.GroupID
	usable    bool // Ready and open to new pods
	labelled  []string
	seen      map[string]time.Time // label of a key: when its job was last seen to start
	fullSince time.Time            // zero: it has room
	// counted is what the stock holds of it, uses the same as the stock is told.
	counted []scoring.Key
	uses    []scoring.Use
}

// NewIndex returns an index that knows no nodes.
func NewIndex(cfg IndexConfig) (*Index, error) {
	if cfg.Label == nil || cfg.WarmLabels == nil || cfg.Group == nil || cfg.Slots == nil || cfg.Now == nil || cfg.Patience <= 0 {
		return nil, errors.New("making a placement index: a field of its configuration is missing")
	}
	return &Index{
		cfg:     cfg,
		keys:    scoring.NewKeys(time.Minute),
		nodes:   map[model.NodeName]*node{},
		warm:    map[string]map[*node]time.Time{},
		pods:    map[string]model.NodeName{},
		perNode: map[model.NodeName]int{},
		free:    scoring.NewStock(nil, time.Time{}),
	}, nil
}

// NodeChanged takes in the present state of a Node.
func (x *Index) NodeChanged(n model.Node) {
	x.mu.Lock()
	defer x.mu.Unlock()
	known := x.nodes[n.Name]
	if known != nil && known.uid != n.UID {
		x.forget(known) // another machine has the name now
		known = nil
	}
	if known == nil {
		known = &node{name: n.Name, uid: n.UID, seen: map[string]time.Time{}}
		x.nodes[n.Name] = known
	}
	x.update(known, func() {
		known.group = x.cfg.Group(n.Labels)
		known.usable = n.Ready && !n.Unschedulable && !n.Draining && n.CATaintSince.IsZero()
		labelled := x.cfg.WarmLabels(n.Labels)
		slices.Sort(labelled)
		if len(labelled) < len(known.labelled) {
			// Keys were taken off: what was seen before may be among them.
			clear(known.seen)
		}
		known.labelled = labelled
	})
}

// NodeGone takes in that a Node was deleted.
func (x *Index) NodeGone(n model.Node) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if known := x.nodes[n.Name]; known != nil {
		x.forget(known)
		delete(x.nodes, n.Name)
	}
}

// PodChanged takes in the present state of a pod.
func (x *Index) PodChanged(p model.Pod) {
	if p.Kind != model.PodRunner {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if p.Node == "" || !p.Finished.IsZero() {
		x.ended(p.UID)
		return
	}
	if _, known := x.pods[p.UID]; known {
		return
	}
	x.pods[p.UID] = p.Node
	x.perNode[p.Node]++
	if n := x.nodes[p.Node]; n != nil {
		x.update(n, func() {
			if p.Key != "" {
				n.seen[x.cfg.Label(p.Key)] = x.cfg.Now()
			}
		})
	}
}

// PodGone takes in that a pod was deleted.
func (x *Index) PodGone(p model.Pod) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ended(p.UID)
}

func (x *Index) ended(uid string) {
	name, known := x.pods[uid]
	if !known {
		return
	}
	delete(x.pods, uid)
	if x.perNode[name]--; x.perNode[name] == 0 {
		delete(x.perNode, name)
	}
	if n := x.nodes[name]; n != nil {
		x.update(n, func() {})
	}
}

// update changes a node and counts it anew.
func (x *Index) update(n *node, change func()) {
	x.forget(n)
	change()
	now := x.cfg.Now()
	room := x.perNode[n.name] < max(x.cfg.Slots(n.group), 1)
	switch {
	case room:
		n.fullSince = time.Time{}
	case n.fullSince.IsZero():
		n.fullSince = now
	}
	n.uses = n.uses[:0]
	hold := func(label string, seen time.Time) {
		if x.warm[label] == nil {
			x.warm[label] = map[*node]time.Time{}
		}
		x.warm[label][n] = seen
		// Neither labels nor sightings say how warm: all count the same.
		n.uses = append(n.uses, scoring.Use{Key: scoring.KeyOf(model.CacheKey(label)), Count: 1})
	}
	for _, label := range n.labelled {
		hold(label, time.Time{})
	}
	for label, at := range n.seen {
		if now.Sub(at) >= seenFor {
			delete(n.seen, label)
		} else if _, too := slices.BinarySearch(n.labelled, label); !too {
			hold(label, at)
		}
	}
	if n.usable && room {
		n.counted = x.free.Add(n.scored(), time.Time{})
	}
}

// forget takes a node out of everything but the list of nodes.
func (x *Index) forget(n *node) {
	x.free.Remove(n.counted)
	n.counted = nil
	for _, u := range n.uses {
		label := string(u.Key.Value())
		delete(x.warm[label], n)
		if len(x.warm[label]) == 0 {
			delete(x.warm, label)
		}
	}
}

func (n *node) scored() scoring.Node { return scoring.Node{Uses: n.uses} }

// choice is where a job finds its cache.
type choice struct {
	warm int // usable nodes that are warm for it
	free int // those of them with room
	// best are the free ones that other keys miss least, the least missed
	// first; at most five.
	best []candidate
	// late: there are warm nodes, and all have been full for longer than a job
	// should wait for one.
	late bool
}

type candidate struct {
	name     model.NodeName
	labelled bool // the node bears the label
	missed   float64
}

// choose looks for the nodes of a group, or of any when it is empty, that are
// warm by the label.
func (x *Index) choose(label string, group model.GroupID) (c choice) {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.cfg.Now()
	key := scoring.KeyOf(model.CacheKey(label))
	c.late = true
	for n, seen := range x.warm[label] {
		labelled := seen.IsZero()
		if !n.usable || group != "" && n.group != group || !labelled && now.Sub(seen) >= seenFor {
			continue
		}
		c.warm++
		if !n.fullSince.IsZero() {
			c.late = c.late && now.Sub(n.fullSince) >= x.cfg.Patience
			continue
		}
		c.free++
		if c.free <= examined {
			c.best = append(c.best, candidate{n.name, labelled, x.free.Missed(n.scored(), key, x.keys, time.Time{})})
		}
	}
	slices.SortFunc(c.best, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.missed, b.missed), cmp.Compare(a.name, b.name))
	})
	c.best = c.best[:min(len(c.best), most)]
	c.late = c.late && c.warm > 0 && c.free == 0
	return c
}
