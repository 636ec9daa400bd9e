package nodegroups

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/cockroachdb/datadriven"

	"github.com/hearth-ci/hearth/pkg/model"
)

// TestStories plays the scripts of testdata. Each is one story, to be read
// from the top; the commands are those of story.run.
//
// Effects are carried out as soon as they are due, and their consequences
// observed, unless a "hold" is in force. A line of output is
//
//	· what happened     a note of Step or Ready
//	! refused           the kind of the refusal and its text
//	> an effect         carried out, failed or held
func TestStories(t *testing.T) {
	datadriven.Walk(t, "testdata/stories", func(t *testing.T, path string) {
		s := &story{world: newWorld()}
		datadriven.RunTest(t, path, func(t *testing.T, d *datadriven.TestData) string {
			s.out.Reset()
			s.run(t, d)
			return s.out.String()
		})
	})
}

type story struct {
	world *world
	group *Group
	// stored is the record as last written: what a restart finds.
	stored Record
	last   model.GroupSnapshot
	hold   bool
	held   []Effect
	blind  bool
	// fail is the error with which effects end, and how.
	fail map[Verb]string
	out  strings.Builder
}

func (s *story) printf(format string, args ...any) { fmt.Fprintf(&s.out, format, args...) }

func (s *story) run(t *testing.T, d *datadriven.TestData) {
	var ids []model.InstanceID // the arguments without a value
	for _, a := range d.CmdArgs {
		if len(a.Vals) == 0 && a.Key != "unseen" && a.Key != "tolerates" {
			ids = append(ids, model.InstanceID(a.Key))
		}
	}
	number := func() int {
		if len(ids) == 0 {
			d.Fatalf(t, "%s needs a number", d.Cmd)
		}
		n, err := strconv.Atoi(string(ids[0]))
		if err != nil {
			d.Fatalf(t, "%s: %v", d.Cmd, err)
		}
		return n
	}
	list := func(name string) (list []model.InstanceID) {
		if a, ok := d.Arg(name); ok {
			for _, v := range a.Vals {
				list = append(list, model.InstanceID(v))
			}
		}
		return list
	}
	switch d.Cmd {
	case "group": // min=0 max=10, and any annotation without its prefix
		s.configure(t, d)
	case "cloud":
		s.cloud(t, d, ids)
	case "node":
		s.node(t, d, ids)
	case "busy", "idle": // a job starts or ends
		for _, id := range ids {
			delete(s.world.jobs, id)
			if d.Cmd == "busy" {
				s.world.jobs[id] = true
			}
			s.step(ObserveBusy{id, d.Cmd == "busy"})
		}
	case "sampled": // activity=busy|idle: what the engine's metrics say
		for _, id := range ids {
			s.world.now = s.world.now.Add(time.Millisecond)
			s.step(ObserveUse{id, model.Activity(argument(d, "activity")), s.world.now, argument(d, "activity") != ""})
		}
	case "engine": // starts, exits, vanishes, is deleted by somebody
		s.engine(t, d, ids)
	case "slip": // a job starts that has not been observed yet
		for _, id := range ids {
			s.world.jobs[id] = true
		}
	case "decide": // i-1=release i-2=park,0.7
		s.step(s.verdicts(t, d))
	case "increase":
		s.step(IncreaseSize{number(), list("prefer")})
	case "delete":
		s.step(DeleteNodes{ids})
	case "decrease":
		s.step(DecreaseTargetSize{-number()})
	case "prescale":
		s.step(Prescale{Want: number(), Prefer: list("prefer"), Reason: "queued-jobs"})
	case "refresh":
		s.step(Refresh{})
	case "loops": // of cluster-autoscaler, ten seconds apart
		for range number() {
			s.world.now = s.world.now.Add(10 * time.Second)
			s.step(Refresh{})
		}
	case "forget":
		s.step(Forget{})
	case "tick": // time passes, the owner calls Ready
		by, err := time.ParseDuration(string(ids[0]))
		if err != nil {
			d.Fatalf(t, "tick: %v", err)
		}
		s.world.now = s.world.now.Add(by)
		s.settle()
	case "hold": // effects take their time from here on
		s.hold = true
	case "run": // and now they end, or only those of some verbs
		s.hold = false
		held := s.held
		s.held = nil
		for _, e := range held {
			if len(ids) > 0 && !slices.Contains(ids, model.InstanceID(e.Verb)) {
				s.held = append(s.held, e)
			} else {
				s.carryOut(e)
			}
		}
		s.hold = len(ids) > 0
		s.settle()
	case "fail": // how=before or how=after: the next effects of a verb fail
		how := "before"
		d.MaybeScanArgs(t, "how", &how)
		if s.fail == nil {
			s.fail = map[Verb]string{}
		}
		for _, id := range ids {
			s.fail[Verb(id)] = how
		}
	case "restart": // the provider dies, with all effects that are under way
		s.begin(s.stored, list("omitted")...)
	case "newcomer": // a provider that has no record of the group
		s.begin(Record{})
	case "blind": // Nodes are observed late: not before "see"
		s.blind = true
	case "see":
		s.blind = false
		for _, id := range slices.Sorted(maps.Keys(s.world.nodes)) {
			s.watch(id)
		}
		s.settle()
	case "show":
		s.show()
	default:
		d.Fatalf(t, "unknown command %q", d.Cmd)
	}
}

// begin starts the provider's life: Nodes are observed before the cloud.
func (s *story) begin(r Record, omitted ...model.InstanceID) {
	s.held, s.hold = nil, false
	before := s.group
	s.group = NewGroup(s.group.Spec(), s.group.Settings(), r)
	for id := range before.members { // a RunnerNode was written of each
		s.apply(Known{id})
	}
	for _, id := range slices.Sorted(maps.Keys(s.world.nodes)) {
		s.apply(ObserveNode{s.world.nodes[id]})
		s.apply(ObserveBusy{id, s.world.jobs[id]})
	}
	for _, id := range slices.Sorted(maps.Keys(s.world.engines)) {
		s.apply(ObserveEngine{id, s.world.engines[id]})
	}
	s.read(omitted...)
	s.settle()
}

func (s *story) configure(t *testing.T, d *datadriven.TestData) {
	spec := model.NodeGroup{ID: "runners", Max: 10, Annotations: map[string]string{}}
	for _, a := range d.CmdArgs {
		switch a.Key {
		case "min":
			a.Scan(t, 0, &spec.Min)
		case "max":
			a.Scan(t, 0, &spec.Max)
		default:
			spec.Annotations[model.Prefix+"/"+a.Key] = a.SingleVal(t)
		}
	}
	settings, problems := ParseSettings(spec, spec.Annotations)
	for _, p := range problems {
		d.Fatalf(t, "%v", p)
	}
	if s.group != nil {
		s.step(Configure{spec, settings})
		return
	}
	s.group = NewGroup(spec, settings, Record{})
	s.look()
}

// cloud changes the cloud behind the group's back and reads it.
func (s *story) cloud(t *testing.T, d *datadriven.TestData, args []model.InstanceID) {
	w := s.world
	if len(args) == 0 {
		s.look()
		return
	}
	ids := args[1:]
	switch args[0] {
	case "boots": // pending instances start to run
		for _, id := range ids {
			w.set(id, model.InstanceRunning)
		}
	case "stopped":
		for _, id := range ids {
			w.set(id, model.InstanceStopped)
		}
	case "terminates": // of its own accord
		for _, id := range ids {
			w.set(id, model.InstanceTerminating)
			w.halt(id)
		}
	case "gone", "loses":
		for _, id := range ids {
			w.remove(id)
			if args[0] == "loses" {
				w.ready(id, false)
			}
		}
	case "ghosts": // one reading lists what is long gone
		s.world.now = s.world.now.Add(time.Millisecond)
		snapshot := s.world.read()
		for _, id := range ids {
			snapshot.Instances = append(snapshot.Instances, model.Instance{ID: id, State: model.InstanceRunning})
		}
		s.apply(ObserveCloud{snapshot})
		s.settle()
		return
	case "repeats": // its last reading
		s.apply(ObserveCloud{s.last})
		s.settle()
		return
	case "omits": // in this one reading
		s.read(ids...)
		s.settle()
		return
	case "capacity":
		w.capacity = atoi(t, d, ids[0])
		return
	case "retries":
		w.launch()
	case "raised": // by somebody, by hand
		w.desired += atoi(t, d, ids[0])
		w.launch()
	default:
		d.Fatalf(t, "cloud: unknown %q", args[0])
	}
	if !d.HasArg("unseen") {
		s.look()
	}
}

func atoi(t *testing.T, d *datadriven.TestData, v model.InstanceID) int {
	n, err := strconv.Atoi(string(v))
	if err != nil {
		d.Fatalf(t, "%v", err)
	}
	return n
}

// node changes Node objects and has them observed.
func (s *story) node(t *testing.T, d *datadriven.TestData, args []model.InstanceID) {
	w := s.world
	for _, id := range args[1:] {
		switch args[0] {
		case "registers":
			s.register(id)
		case "ready":
			if _, ok := w.nodes[id]; !ok {
				s.register(id)
			}
			w.ready(id, true)
		case "unready":
			w.ready(id, false)
		case "deleted": // by hand
			delete(w.nodes, id)
		case "tainted": // by cluster-autoscaler
			w.change(id, func(n *model.Node) { n.CATaintSince, n.Unschedulable = w.now, true })
		default:
			d.Fatalf(t, "node: unknown %q", args[0])
		}
		s.watch(id)
	}
	s.settle()
}

// engine changes engine pods and has them observed.
func (s *story) engine(t *testing.T, d *datadriven.TestData, args []model.InstanceID) {
	w := s.world
	for _, id := range args[1:] {
		switch args[0] {
		case "starts": // [tolerates] [grace=5m]
			most := 5 * time.Minute
			if grace := argument(d, "grace"); grace != "" {
				var err error
				if most, err = time.ParseDuration(grace); err != nil {
					d.Fatalf(t, "%v", err)
				}
			}
			w.startEngine(id, model.EngineState{ToleratesDrain: d.HasArg("tolerates")}, most)
		case "exits": // [code=0]
			code := 0
			d.MaybeScanArgs(t, "code", &code)
			w.exitEngines(id, code, func() { s.apply(ObserveEngine{id, w.engines[id]}) })
		case "vanishes":
			w.vanishEngines(id)
		case "deleted": // by somebody else
			for _, p := range w.engines[id] {
				w.changeEngine(id, p.UID, w.tellToStop)
			}
		default:
			d.Fatalf(t, "engine: unknown %q", args[0])
		}
		s.watch(id)
	}
	s.settle()
}

func argument(d *datadriven.TestData, name string) string {
	if a, ok := d.Arg(name); ok && len(a.Vals) > 0 {
		return a.Vals[0]
	}
	return ""
}

func (s *story) verdicts(t *testing.T, d *datadriven.TestData) Decide {
	var e Decide
	for _, a := range d.CmdArgs {
		decision, score, _ := strings.Cut(a.SingleVal(t), ",")
		v := model.Verdict{Instance: model.InstanceID(a.Key), Decision: model.Decision(decision)}
		if score != "" {
			var err error
			if v.Score, err = strconv.ParseFloat(score, 64); err != nil {
				d.Fatalf(t, "%v", err)
			}
		}
		e.Verdicts = append(e.Verdicts, v)
	}
	return e
}

// step is the owner's duty for one event, and then for all that follows.
func (s *story) step(e Event) {
	if s.apply(e) {
		s.settle()
	}
}

func (s *story) apply(e Event) bool {
	next := s.group.Clone()
	out, err := next.Step(e, s.world.now)
	if err != nil {
		var refusal *Error
		errors.As(err, &refusal)
		s.printf("! %s (%s): %v\n", refusal.Kind, refusal.Reason, err)
		return false
	}
	s.commit(next, out)
	return true
}

// commit keeps the group. The record is written at once: for stories, which
// tell of restarts at the worst moment by holding effects.
func (s *story) commit(next *Group, out Outcome) {
	for _, n := range out.Notes {
		s.printf("· %s", n.Action)
		if n.Instance != "" {
			s.printf(" %s", n.Instance)
		} else {
			s.printf(" %d", n.Count)
		}
		s.printf(": %s", n.Reason)
		if n.Detail != "" {
			s.printf(" (%s)", n.Detail)
		}
		s.printf("\n")
	}
	if out.Commit > CommitNone {
		s.stored = next.Record()
	}
	s.group = next
}

// settle carries out what is due until nothing is.
func (s *story) settle() {
	for range 30 {
		next := s.group.Clone()
		out, effects := next.Ready(s.world.now)
		s.commit(next, out)
		if len(effects) == 0 {
			return
		}
		for _, e := range effects {
			s.carryOut(e)
		}
	}
	s.printf("and so on, for ever\n")
}

func (s *story) carryOut(e Effect) {
	s.printf("> %s", e.Verb)
	switch {
	case e.Verb == Resize:
		s.printf(" to %d", e.Desired)
	case e.Verb.Cloud():
		for _, id := range e.Instances {
			s.printf(" %s", id)
		}
	default:
		s.printf(" %s", e.Node.ID)
	}
	if s.hold {
		s.printf(" (held)\n")
		s.held = append(s.held, e)
		return
	}
	how, failed := s.fail[e.Verb]
	delete(s.fail, e.Verb)
	var idle bool // or of Look: there, of StopEngine: gone
	if how != "before" {
		idle = s.world.apply(e)
	}
	if e.Verb == Confirm && !failed {
		s.printf(": idle %v", idle)
	}
	if e.Verb == Look && !failed {
		s.printf(": there %v", idle)
	}
	var err error
	if failed {
		err = errors.New("timeout")
		s.printf(" (failed %s it took effect)", how)
	}
	s.printf("\n")
	if e.Verb == Confirm && !failed {
		s.apply(Confirmed{e.Node.ID, idle, s.world.engines[e.Node.ID]})
		if !idle {
			s.apply(ObserveBusy{e.Node.ID, true})
		}
	}
	if e.Verb == Look && !failed {
		if idle {
			s.apply(ObserveNode{s.world.nodes[e.Node.ID]})
		}
		s.apply(Looked{e.Node.ID})
	}
	if e.Verb == StopEngine && !failed && idle {
		s.printf("it is gone\n")
		s.apply(EngineGone{e.Node.ID, e.Engine.UID})
	}
	s.apply(Done{e, err, s.world.now})
	if !e.Verb.Cloud() {
		s.watch(e.Node.ID)
		return
	}
	if e.Verb == Resize {
		s.world.launch()
	}
	for _, id := range e.Instances {
		s.watch(id)
	}
	s.read()
}

// read has the cloud observed, but for what the reading omits; look does so
// and goes on from there.
func (s *story) read(omitted ...model.InstanceID) {
	s.world.now = s.world.now.Add(time.Millisecond)
	snapshot := s.world.read()
	snapshot.Instances = slices.DeleteFunc(snapshot.Instances, func(i model.Instance) bool { return slices.Contains(omitted, i.ID) })
	s.last = snapshot
	s.apply(ObserveCloud{snapshot})
}

func (s *story) look() {
	s.read()
	for _, id := range slices.Sorted(maps.Keys(s.world.nodes)) {
		s.watch(id)
	}
	s.settle()
}

// watch has the state of one Node observed.
func (s *story) watch(id model.InstanceID) {
	if s.blind {
		return
	}
	if n, ok := s.world.nodes[id]; ok {
		s.apply(ObserveNode{n})
	} else {
		s.apply(ObserveNodeGone{id})
	}
	if s.group.busy[id] && !s.world.jobs[id] {
		s.apply(ObserveBusy{id, false})
	}
	if pods := s.world.engines[id]; len(pods)+len(s.group.engines[id]) > 0 {
		s.apply(ObserveEngine{id, pods})
	}
}

// show prints the sizes, then a line for every instance that anybody knows.
func (s *story) show() {
	r, v, w := s.group.Record(), s.group.View(), s.world
	s.printf("target %d, hidden %d; cluster-autoscaler sees %d; the cloud works towards %d\n", r.Target, r.Hidden, v.Target, w.desired)
	table := tabwriter.NewWriter(&s.out, 0, 0, 2, ' ', 0)
	status := map[model.InstanceID]NodeStatus{}
	for _, n := range s.group.Nodes() {
		status[n.ID] = n
	}
	all := w.ids()
	for id := range w.nodes {
		all = append(all, id)
	}
	for id := range status {
		all = append(all, id)
	}
	for id := range r.Intents {
		all = append(all, id)
	}
	for _, i := range v.Instances {
		all = append(all, i.ID)
	}
	slices.Sort(all)
	all = slices.Compact(all)
	if len(all) > 0 {
		fmt.Fprintln(table, "INSTANCE\tCLOUD\tNODE\tPHASE\tCOUNTS AS\tAUTOSCALER SEES")
	}
	for _, id := range all {
		node := "-"
		if n, ok := w.nodes[id]; ok {
			node = map[bool]string{true: "Ready", false: "NotReady"}[n.Ready]
			if n.Draining {
				node += ",draining"
			}
			if !n.CATaintSince.IsZero() {
				node += ",ToBeDeleted"
			}
			if w.jobs[id] {
				node += ",busy"
			}
		}
		for _, p := range w.engines[id] {
			switch code, ended := EngineExit(p); {
			case ended:
				node += fmt.Sprintf(",engine exited %s", code)
			case p.EngineState.Deleting:
				node += ",engine stopping"
			default:
				node += ",engine"
			}
			if p.EngineState.Guarded {
				node += " (guarded)"
			}
		}
		counts := "-"
		if n, ok := status[id]; ok {
			switch {
			case n.Desired != model.DesiredRunning:
				counts = "leaving"
			case n.Hidden:
				counts = "hidden"
			default:
				counts = "target"
			}
		}
		sees := "not mine"
		if at, ok := v.find(id); ok {
			sees = map[InstanceStatus]string{StatusRunning: "running", StatusCreating: "creating", StatusDeleting: "deleting"}[v.Instances[at].Status]
			if f := v.Instances[at].Failure; f != nil {
				sees += ", failed: " + string(f.Class)
			}
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", id,
			cmp.Or(string(w.instances[id].State), "-"), node, cmp.Or(string(status[id].Phase), "-"), counts, sees)
	}
	_ = table.Flush()
}

// register lets a Node appear that is a little older than the next reading:
// creation times come in whole seconds, and one that is as new says nothing.
func (s *story) register(id model.InstanceID) {
	s.world.register(id)
	s.world.change(id, func(n *model.Node) { n.Created = n.Created.Add(-2 * time.Second) })
}
