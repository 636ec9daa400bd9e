package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

var errInjected = errors.New("injected failure")

// fault is how one call goes wrong. "After" means that it has taken effect.
type fault int

const (
	healthy fault = iota
	failBefore
	failAfter
	hangBefore // until the caller gives up
	hangAfter
	deaf // takes effect after a while, whether the caller has given up or not
)

// deafFor is longer than any caller waits for a record.
const deafFor = 4 * time.Second

// faults lets the calls of one fake go wrong. The zero value lets them
// succeed at once.
type faults struct {
	mu      sync.Mutex
	latency time.Duration
	rule    func(op string) fault
	calls   map[string]int // by operation, those that took effect or failed
}

func (f *faults) set(rule func(op string) fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rule = rule
}

func (f *faults) always(kind fault) { f.set(func(string) fault { return kind }) }
func (f *faults) heal()             { f.set(nil) }

func (f *faults) setLatency(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.latency = d
}

// only lets calls of these operations go wrong.
func (f *faults) only(kind fault, ops ...string) {
	f.set(func(op string) fault {
		if slices.Contains(ops, op) {
			return kind
		}
		return healthy
	})
}

func (f *faults) count(op string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op]
}

// call carries out one operation. The latency is spent half before and half
// after the effect, so that whoever is killed in the middle finds it done or
// not done.
func (f *faults) call(ctx context.Context, op string, effect func() error) error {
	f.mu.Lock()
	if f.calls == nil {
		f.calls = map[string]int{}
	}
	f.calls[op]++
	kind := healthy
	if f.rule != nil {
		kind = f.rule(op)
	}
	latency := f.latency
	f.mu.Unlock()

	if !pause(ctx, latency/2) {
		return ctx.Err()
	}
	switch kind {
	case failBefore:
		return fmt.Errorf("%s: %w", op, errInjected)
	case hangBefore:
		<-ctx.Done()
		return ctx.Err()
	case deaf:
		time.Sleep(deafFor)
		return effect()
	}
	if err := effect(); err != nil {
		return err
	}
	switch kind {
	case failAfter:
		return fmt.Errorf("%s: %w", op, errInjected)
	case hangAfter:
		<-ctx.Done()
		return ctx.Err()
	}
	if !pause(ctx, latency/2) {
		return ctx.Err()
	}
	return nil
}

// fakeCloud is a cloud that keeps what Backend promises, and fails as it is
// told to.
type fakeCloud struct {
	faults
	boot, resume, stopping, terminating time.Duration

	state  sync.Mutex
	groups map[model.GroupID]*fakeGroup
	broken map[model.GroupID]error // groups that cannot be read
	// forgetful leaves each instance out of so many snapshots, but never out of
	// two in a row.
	forgetful int
	// stale answers Snapshot with what was true this long ago.
	stale    time.Duration
	past     []pastState
	launched int
	// name of a new machine's Node; by default one that was never used.
	name  func(n int) model.NodeName
	lives map[model.InstanceID]string // what became of each instance, for failures of tests
}

type fakeGroup struct {
	desired  int
	machines map[model.InstanceID]*machine
	capacity int // living machines at most; negative: no bound
	failure  *model.LaunchFailure
	retryAt  time.Time
}

type machine struct {
	model.Instance
	due      time.Time
	node     model.NodeName
	omitted  int  // snapshots that left it out
	listed   bool // in the last one that arrived
	deadBoot bool // its Node never registers
}

type pastState struct {
	at     time.Time
	groups map[model.GroupID]model.GroupSnapshot
}

func newFakeCloud(groups []model.NodeGroup) *fakeCloud {
	c := &fakeCloud{
		boot: 20 * time.Second, resume: 5 * time.Second, stopping: 3 * time.Second, terminating: 3 * time.Second,
		groups: map[model.GroupID]*fakeGroup{}, broken: map[model.GroupID]error{},
		lives: map[model.InstanceID]string{},
		name:  func(n int) model.NodeName { return model.NodeName(fmt.Sprintf("n-%03d", n)) },
	}
	c.latency = 200 * time.Millisecond
	for _, g := range groups {
		c.add(g.ID)
	}
	return c
}

func (c *fakeCloud) add(id model.GroupID) {
	c.state.Lock()
	defer c.state.Unlock()
	c.groups[id] = &fakeGroup{machines: map[model.InstanceID]*machine{}, capacity: -1}
}

func living(s model.InstanceState) bool {
	return s == model.InstancePending || s == model.InstanceRunning
}

func (g *fakeGroup) living() (n int) {
	for _, m := range g.machines {
		if living(m.State) {
			n++
		}
	}
	return n
}

// step does what is due.
func (c *fakeCloud) step(now time.Time) {
	c.state.Lock()
	defer c.state.Unlock()
	for id, g := range c.groups {
		for mid, m := range g.machines {
			if now.Before(m.due) {
				continue
			}
			switch m.State {
			case model.InstancePending:
				m.State = model.InstanceRunning
			case model.InstanceStopping:
				m.State = model.InstanceStopped
			case model.InstanceTerminating:
				c.lives[mid] += " gone"
				delete(g.machines, mid)
			}
		}
		for g.living() < g.desired && !now.Before(g.retryAt) {
			if g.capacity >= 0 && g.living() >= g.capacity {
				g.failure = &model.LaunchFailure{
					Activity: fmt.Sprintf("a%d", now.Unix()), Class: model.FailureCapacity, Message: "no capacity", At: now,
				}
				g.retryAt = now.Add(20 * time.Second)
				break
			}
			c.launched++
			mid := model.InstanceID(fmt.Sprintf("fake:///%s/i-%03d", id, c.launched))
			g.machines[mid] = &machine{
				Instance: model.Instance{ID: mid, State: model.InstancePending, LaunchedAt: now},
				due:      now.Add(c.boot), node: c.name(c.launched),
			}
			c.lives[mid] = "launched"
		}
		if g.living() >= g.desired {
			g.failure, g.retryAt = nil, time.Time{}
		}
	}
	c.past = append(c.past, pastState{now, c.read()})
	for len(c.past) > 2 && now.Sub(c.past[1].at) > c.stale {
		c.past = c.past[1:]
	}
}

func (c *fakeCloud) read() map[model.GroupID]model.GroupSnapshot {
	groups := map[model.GroupID]model.GroupSnapshot{}
	for id, g := range c.groups {
		s := model.GroupSnapshot{Desired: g.desired}
		if g.failure != nil {
			s.Failure = new(*g.failure)
		}
		for _, mid := range slices.Sorted(maps.Keys(g.machines)) {
			s.Instances = append(s.Instances, g.machines[mid].Instance)
		}
		groups[id] = s
	}
	return groups
}

func (c *fakeCloud) Snapshot(ctx context.Context) (s model.Snapshot, err error) {
	err = c.call(ctx, "snapshot", func() error {
		c.state.Lock()
		defer c.state.Unlock()
		s = model.Snapshot{Groups: c.read(), Errors: maps.Clone(c.broken)}
		if c.stale > 0 && len(c.past) > 0 {
			s.Groups = maps.Clone(c.past[0].groups)
		}
		for id := range c.broken {
			delete(s.Groups, id)
		}
		for id, g := range s.Groups {
			g.Instances = slices.DeleteFunc(slices.Clone(g.Instances), func(i model.Instance) bool {
				m := c.groups[id].machines[i.ID]
				return m != nil && m.listed && m.omitted < c.forgetful
			})
			s.Groups[id] = g
		}
		return nil
	})
	if err == nil {
		c.arrived(s)
	}
	return s, err
}

// arrived remembers what a snapshot that arrived has left out.
func (c *fakeCloud) arrived(s model.Snapshot) {
	c.state.Lock()
	defer c.state.Unlock()
	for id, g := range s.Groups {
		for mid, m := range c.groups[id].machines {
			m.listed = slices.ContainsFunc(g.Instances, func(i model.Instance) bool { return i.ID == mid })
			if !m.listed {
				m.omitted++
			}
		}
	}
}

// act carries out an operation on one group.
func (c *fakeCloud) act(ctx context.Context, op string, group model.GroupID, change func(g *fakeGroup, now time.Time)) error {
	return c.call(ctx, op, func() error {
		c.state.Lock()
		defer c.state.Unlock()
		g := c.groups[group]
		if g == nil {
			return fmt.Errorf("no group %q", group)
		}
		change(g, time.Now())
		return nil
	})
}

func (c *fakeCloud) Resize(ctx context.Context, group model.GroupID, desired int) error {
	return c.act(ctx, "resize", group, func(g *fakeGroup, _ time.Time) {
		if desired > g.desired {
			g.retryAt = time.Time{}
		}
		g.desired = max(desired, g.living())
	})
}

func (c *fakeCloud) each(g *fakeGroup, ids []model.InstanceID, f func(*machine)) {
	for _, id := range ids {
		if m := g.machines[id]; m != nil {
			f(m)
		}
	}
}

func (c *fakeCloud) Terminate(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	return c.act(ctx, "terminate", group, func(g *fakeGroup, now time.Time) {
		c.each(g, ids, func(m *machine) {
			if m.State == model.InstanceTerminating {
				return
			}
			if living(m.State) {
				g.desired--
			}
			m.State, m.due = model.InstanceTerminating, now.Add(c.terminating)
			c.lives[m.ID] += " terminated"
		})
	})
}

func (c *fakeCloud) Stop(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	return c.act(ctx, "stop", group, func(g *fakeGroup, now time.Time) {
		c.each(g, ids, func(m *machine) {
			if living(m.State) {
				g.desired--
				m.State, m.due = model.InstanceStopping, now.Add(c.stopping)
				c.lives[m.ID] += " stopped"
			}
		})
	})
}

func (c *fakeCloud) Start(ctx context.Context, group model.GroupID, ids []model.InstanceID) error {
	var failed error
	err := c.act(ctx, "start", group, func(g *fakeGroup, now time.Time) {
		c.each(g, ids, func(m *machine) {
			switch m.State {
			case model.InstanceStopped:
				g.desired++
				m.State, m.LaunchedAt, m.due = model.InstancePending, now, now.Add(c.resume)
				c.lives[m.ID] += " started"
			case model.InstanceStopping:
				failed = fmt.Errorf("%q is stopping", m.ID)
			}
		})
	})
	return errors.Join(err, failed)
}

// edit changes a group behind Hearth's back.
func (c *fakeCloud) edit(group model.GroupID, change func(*fakeGroup)) {
	c.state.Lock()
	defer c.state.Unlock()
	change(c.groups[group])
}

// tune changes the cloud's ways.
func (c *fakeCloud) tune(change func(*fakeCloud)) {
	c.state.Lock()
	defer c.state.Unlock()
	change(c)
}

func (c *fakeCloud) ids() []model.GroupID {
	c.state.Lock()
	defer c.state.Unlock()
	return slices.Sorted(maps.Keys(c.groups))
}

// machines returns copies of a group's machines, by id.
func (c *fakeCloud) machines(group model.GroupID) map[model.InstanceID]machine {
	c.state.Lock()
	defer c.state.Unlock()
	out := map[model.InstanceID]machine{}
	for id, m := range c.groups[group].machines {
		out[id] = *m
	}
	return out
}

// stopped counts a group's stopped machines.
func (c *fakeCloud) stopped(group model.GroupID) (n int) {
	for _, m := range c.machines(group) {
		if m.State == model.InstanceStopped {
			n++
		}
	}
	return n
}

func (c *fakeCloud) launches() int {
	c.state.Lock()
	defer c.state.Unlock()
	return c.launched
}

func (c *fakeCloud) desired(group model.GroupID) int {
	c.state.Lock()
	defer c.state.Unlock()
	return c.groups[group].desired
}

// fakeStore is what survives. Each life opens a client of it, which notices
// when another one has written, as the real one does.
type fakeStore struct {
	faults
	state       sync.Mutex
	records     map[model.GroupID]nodegroups.Record
	summaries   map[model.GroupID]model.GroupSummary
	annotations map[model.GroupID]map[string]string
	nodes       map[model.InstanceID]model.NodeRecord
	nodeWrites  []model.NodeRecord
}

func newFakeStore() *fakeStore {
	s := &fakeStore{
		records:     map[model.GroupID]nodegroups.Record{},
		summaries:   map[model.GroupID]model.GroupSummary{},
		annotations: map[model.GroupID]map[string]string{},
		nodes:       map[model.InstanceID]model.NodeRecord{},
	}
	s.latency = 20 * time.Millisecond
	return s
}

// storeClient is one process's access.
type storeClient struct {
	*fakeStore
	known, tried map[model.GroupID]int64
}

func (s *fakeStore) open() *storeClient {
	return &storeClient{s, map[model.GroupID]int64{}, map[model.GroupID]int64{}}
}

func (s *storeClient) Load(ctx context.Context) (
	records map[model.GroupID]nodegroups.Record, annotations map[model.GroupID]map[string]string, nodes []model.NodeRecord, err error,
) {
	err = s.call(ctx, "load", func() error {
		s.state.Lock()
		defer s.state.Unlock()
		records, annotations = map[model.GroupID]nodegroups.Record{}, map[model.GroupID]map[string]string{}
		for id, r := range s.records {
			r.Intents = maps.Clone(r.Intents)
			records[id], s.known[id] = r, r.Sequence
		}
		for id, a := range s.annotations {
			annotations[id] = maps.Clone(a)
		}
		for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
			nodes = append(nodes, s.nodes[id])
		}
		return nil
	})
	return records, annotations, nodes, err
}

func (s *storeClient) SaveGroup(ctx context.Context, group model.GroupID, r nodegroups.Record, summary model.GroupSummary) error {
	return s.call(ctx, "save-group", func() error {
		s.state.Lock()
		defer s.state.Unlock()
		at := s.records[group].Sequence
		if at != 0 && at != s.known[group] && at != s.tried[group] {
			return fmt.Errorf("sequence %d: %w", at, model.ErrSuperseded)
		}
		r.Intents = maps.Clone(r.Intents)
		for id, i := range r.Intents {
			i.Since = i.Since.Truncate(time.Second)
			r.Intents[id] = i
		}
		s.tried[group] = r.Sequence
		s.records[group], s.summaries[group] = r, summary
		return nil
	})
}

func (s *storeClient) SaveNode(ctx context.Context, r model.NodeRecord) error {
	return s.call(ctx, "save-node", func() error {
		s.state.Lock()
		defer s.state.Unlock()
		r.Since = r.Since.Truncate(time.Second)
		r.Warmth = slices.Clone(r.Warmth)
		for i := range r.Warmth {
			r.Warmth[i].LastUsed = r.Warmth[i].LastUsed.Truncate(time.Second)
		}
		s.nodes[r.ID] = r
		s.nodeWrites = append(s.nodeWrites, r)
		return nil
	})
}

func (s *storeClient) DeleteNode(ctx context.Context, id model.InstanceID) error {
	return s.call(ctx, "delete-node", func() error {
		s.state.Lock()
		defer s.state.Unlock()
		delete(s.nodes, id)
		return nil
	})
}

func (s *fakeStore) record(group model.GroupID) nodegroups.Record {
	s.state.Lock()
	defer s.state.Unlock()
	r := s.records[group]
	r.Intents = maps.Clone(r.Intents)
	return r
}

func (s *fakeStore) summary(group model.GroupID) model.GroupSummary {
	s.state.Lock()
	defer s.state.Unlock()
	return s.summaries[group]
}

func (s *fakeStore) nodeRecords() map[model.InstanceID]model.NodeRecord {
	s.state.Lock()
	defer s.state.Unlock()
	return maps.Clone(s.nodes)
}

// writesSince returns the RunnerNode writes after the first n.
func (s *fakeStore) writesSince(n int) []model.NodeRecord {
	s.state.Lock()
	defer s.state.Unlock()
	return slices.Clone(s.nodeWrites[n:])
}

func (s *fakeStore) edit(change func(*fakeStore)) {
	s.state.Lock()
	defer s.state.Unlock()
	change(s)
}

// fakeMemories keeps what was learnt.
type fakeMemories struct {
	faults
	state sync.Mutex
	kept  map[model.GroupID][]byte
}

func newFakeMemories() *fakeMemories {
	m := &fakeMemories{kept: map[model.GroupID][]byte{}}
	m.latency = 20 * time.Millisecond
	return m
}

func (m *fakeMemories) LoadLearnt(ctx context.Context) (kept map[model.GroupID][]byte, err error) {
	err = m.call(ctx, "load-learnt", func() error {
		m.state.Lock()
		defer m.state.Unlock()
		kept = maps.Clone(m.kept)
		return nil
	})
	return kept, err
}

func (m *fakeMemories) SaveLearnt(ctx context.Context, group model.GroupID, data []byte) error {
	return m.call(ctx, "save-learnt", func() error {
		m.state.Lock()
		defer m.state.Unlock()
		m.kept[group] = data
		return nil
	})
}

func (m *fakeMemories) of(group model.GroupID) []byte {
	m.state.Lock()
	defer m.state.Unlock()
	return m.kept[group]
}

func (m *fakeMemories) put(group model.GroupID, data []byte) {
	m.state.Lock()
	defer m.state.Unlock()
	m.kept[group] = data
}

// fakeEvents remembers what people were told, as "object severity reason: message".
type fakeEvents struct {
	mu   sync.Mutex
	said []string
}

func (e *fakeEvents) say(object string, severity model.Severity, reason, message string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.said = append(e.said, fmt.Sprintf("%s %s %s: %s", object, severity, reason, message))
}

func (e *fakeEvents) Node(n model.Node, severity model.Severity, reason, message string) {
	e.say(string(n.Name), severity, reason, message)
}

func (e *fakeEvents) Group(g model.GroupID, severity model.Severity, reason, message string) {
	e.say(string(g), severity, reason, message)
}

// with returns what was said that contains every part.
func (e *fakeEvents) with(parts ...string) (found []string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, line := range e.said {
		if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(line, part) }) {
			found = append(found, line)
		}
	}
	return found
}
