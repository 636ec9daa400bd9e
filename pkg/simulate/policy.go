package simulate

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
)

// Policy decides where waiting jobs go and what becomes of the nodes that
// nobody uses. It sees what a live one would see: never a job before it
// arrives, nor how long one will run. What it is given it must not change, and
// nodes and pods it keeps hold of go on changing.
//
// At every instant at which something happens the engine first carries out
// what happened, telling of it through Arrived and Finished, then asks Place
// for the jobs that wait, then Plan.
type Policy interface {
	// Arrived tells of a new job, before it is placed.
	Arrived(f *Fleet, p *Pod)
	// Place says what a waiting job does. Jobs are asked for in the order of
	// their arrival, anew whenever a node may have become free.
	Place(f *Fleet, p *Pod) Choice
	// Finished tells of a job that has ended on p.Node.
	Finished(f *Fleet, p *Pod)
	// Plan says what becomes of idle and parked nodes, and what is started
	// ahead of demand. It is asked at the beginning, after every instant at
	// which something happened, and at the time it returned last.
	Plan(f *Fleet) Plan
}

// Choice is what a waiting job does. The zero value waits for what it was
// promised before.
type Choice struct {
	verb choiceVerb
	node *Node
}

type choiceVerb int

const (
	choiceWait choiceVerb = iota
	choiceTake
	choiceAwait
	choiceLaunch
)

// Take starts the job on a node that has a free slot.
func Take(n *Node) Choice { return Choice{choiceTake, n} }

// Await promises the job a node that is on its way, or one that is parked:
// that one is resumed. The promise does not bind: whichever node gets a free
// slot first is offered to every job that waits.
func Await(n *Node) Choice { return Choice{choiceAwait, n} }

// Launch boots a node and promises it to the job.
func Launch() Choice { return Choice{verb: choiceLaunch} }

// Wait does nothing now.
func Wait() Choice { return Choice{} }

// Plan is what becomes of nodes without jobs.
type Plan struct {
	// Park stops idle nodes. Release ends idle and parked ones.
	Park, Release []*Node
	// Resume starts parked nodes ahead of demand, Launch new ones.
	Resume []*Node
	Launch int
	// Next is when the plan would change if nothing happened until then, in
	// epoch seconds after now; 0 means never.
	Next int64
}

// NamedPolicy is a policy that can be asked for by its name.
type NamedPolicy struct {
	Name string
	// Doc is one sentence for people.
	Doc string
	// New makes a policy for one run. It may look into the trace only for the
	// size of a pool that a person would have had to choose.
	New func(Trace, World, *rand.Rand) Policy
	// Queued: it hears of jobs when they are queued, others when they have a
	// pod.
	Queued bool
}

// Policies lists every policy once, in the order of reports: what people run
// today, what research proposes, the simple rules, ours.
func Policies() []NamedPolicy {
	return append(baselines(),
		hearthWith(ours, "nodes parked by rent-or-buy bound and forecast, resumed ahead of expected jobs, placed by cache", Knobs{}),
		hearthAt(20), hearthAt(45), hearthAt(60), hearthAt(90),
	)
}

// ours is the name of the live policy.
const ours = "hearth"

// noPrewarm is the live policy without starts ahead of demand. It is compared
// on request, and is not among the policies.
const noPrewarm = ours + "-no-prewarm"

// noPrescale is the live policy that neither hears of queued jobs nor starts
// anything ahead, as with the annotation prescale: off.
const noPrescale = ours + "-no-prescale"

// noWait is the live policy where placement is but a preference: a job takes a
// cold node that has room rather than wait for a warm one.
const noWait = ours + "-no-wait"

// hearthAt is the live policy with another time-value.
func hearthAt(timeValue float64) NamedPolicy {
	value := strconv.FormatFloat(timeValue, 'f', -1, 64)
	return hearthWith(ours+"@"+value, "the same with the annotation time-value at $"+value+"/h", Knobs{TimeValue: timeValue})
}

func hearthWith(name, doc string, k Knobs) NamedPolicy {
	return NamedPolicy{Name: name, Doc: doc, Queued: !k.NoPrescale, New: func(_ Trace, w World, _ *rand.Rand) Policy { return newHearth(w, k) }}
}

// FindPolicy returns the policy of that name, or an error that lists the known
// ones. hearth@ and a number is hearth with that time-value; hearth-no-prewarm,
// with a time-value or not, starts nothing ahead of demand, hearth-no-prescale
// neither hears of queued jobs, and the jobs of hearth-no-wait never wait for a
// warm node while another has room.
func FindPolicy(name string) (NamedPolicy, error) {
	var known []string
	for _, p := range Policies() {
		if p.Name == name {
			return p, nil
		}
		known = append(known, p.Name)
	}
	base, value, at := strings.Cut(name, "@")
	if base == noPrewarm || base == noPrescale || base == noWait || base == ours {
		var k Knobs
		if at {
			var err error
			k.TimeValue, err = strconv.ParseFloat(value, 64)
			if err != nil || !(k.TimeValue > 0 && k.TimeValue <= 10000) {
				return NamedPolicy{}, fmt.Errorf("policy %q: want a time-value in $/h after the @, above 0 and at most 10000", name)
			}
		}
		if base == ours {
			return hearthAt(k.TimeValue), nil
		}
		if base == noWait {
			k.NoWait = true
			return hearthWith(name, "hearth whose jobs take a cold node with room rather than wait for a warm one", k), nil
		}
		k.NoPrewarm, k.NoPrescale = true, base == noPrescale
		if k.NoPrescale {
			return hearthWith(name, "hearth that starts nothing before there is a pod", k), nil
		}
		return hearthWith(name, "hearth without starts ahead of demand", k), nil
	}
	slices.Sort(known)
	return NamedPolicy{}, fmt.Errorf("unknown policy %q, known are %s, and hearth@ with any time-value in $/h", name, strings.Join(known, ", "))
}
