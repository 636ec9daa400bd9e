package simulate

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Variation is a world that differs from another in one value.
type Variation struct {
	// Parameter is what differs, Change in which way and Value what it is now,
	// in words: "boot", "halved", "60 s". All are empty for the world itself.
	Parameter, Change, Value string
	World                    World
}

// Sensitive is what the policies cost in a variation, and how hearth does.
type Sensitive struct {
	Variation
	// Outcomes are in the order of the policies.
	Outcomes []Outcome
	// Hearth is the first of hearth's own policies, Best the cheapest of the
	// others. Rank is 1 where none of the others costs less than Hearth.
	Hearth, Best Outcome
	Rank         int
}

// Outcome is what a policy costs, in dollars.
type Outcome struct {
	Policy                string
	Infrastructure, Delay float64
}

// Total dollars.
func (o Outcome) Total() float64 { return o.Infrastructure + o.Delay }

// Ratio is hearth's total to that of the best other policy: below 1 it wins.
func (s Sensitive) Ratio() float64 {
	if s.Best.Total() == 0 {
		return 1
	}
	return s.Hearth.Total() / s.Best.Total()
}

// Ours says whether a policy of that name is one of hearth's own.
func Ours(name string) bool {
	base, _, _ := strings.Cut(name, "@")
	return base == ours || base == noPrewarm
}

// Variations returns the world itself and then those in which one value is half
// or double of what it is here; and for the price of a parked node, those in
// which it is a given share of a running one's. Times are in whole seconds, and
// counts at least 1; what changes nothing by that is left out.
func Variations(w World) []Variation {
	all := []Variation{{World: w}}
	add := func(p parameter, change string, varied World) {
		all = append(all, Variation{p.name, change, p.text(varied), varied})
	}
	for _, p := range parameters() {
		for _, c := range []struct {
			change string
			factor float64
		}{{"halved", 0.5}, {"doubled", 2}} {
			varied := w
			p.scale(&varied, c.factor)
			if varied != w && varied.Validate() == nil {
				add(p, c.change, varied)
			}
		}
		if p.name != parkedPrice {
			continue
		}
		// The price of the disk, from a small one to a large one.
		for _, percent := range []float64{3, 7, 14, 22} {
			varied := w
			varied.ParkedPrice = w.Price * percent / 100
			add(p, fmt.Sprintf("%g %% of the price", percent), varied)
		}
	}
	return all
}

// Sensitivity runs the policies in every variation of the world. Among them
// have to be one of hearth's own and another one. As many runs as there are
// processors go on at once; what comes out does not depend on their number.
// o.Progress, when set, is told how many jobs have arrived in all runs
// together, by one of them at a time.
func Sensitivity(t Trace, w World, policies []NamedPolicy, o Options) ([]Sensitive, error) {
	ours := func(p NamedPolicy) bool { return Ours(p.Name) }
	if !slices.ContainsFunc(policies, ours) || !slices.ContainsFunc(policies, func(p NamedPolicy) bool { return !ours(p) }) {
		return nil, errors.New("sensitivity: want one of hearth's policies and another to compare it with")
	}
	variations := Variations(w)
	all := make([]Sensitive, len(variations))
	tally := tally{tell: o.Progress}
	o.Halves, o.Samples, o.Watch = false, 0, nil
	var runs sync.WaitGroup
	free := make(chan struct{}, runtime.GOMAXPROCS(0))
	for i, v := range variations {
		all[i] = Sensitive{Variation: v, Outcomes: make([]Outcome, len(policies))}
		for j, p := range policies {
			free <- struct{}{}
			runs.Go(func() {
				defer func() { <-free }()
				all[i].Outcomes[j] = tally.run(t, v, p, o)
			})
		}
	}
	runs.Wait()
	if tally.err != nil {
		return nil, fmt.Errorf("sensitivity: %w", tally.err)
	}
	for i := range all {
		all[i].compare()
	}
	return all, nil
}

func (s *Sensitive) compare() {
	var others []Outcome
	for _, o := range s.Outcomes {
		switch {
		case !Ours(o.Policy):
			others = append(others, o)
		case s.Hearth.Policy == "":
			s.Hearth = o
		}
	}
	s.Best = slices.MinFunc(others, func(a, b Outcome) int { return cmp.Compare(a.Total(), b.Total()) })
	s.Rank = 1
	for _, o := range others {
		if o.Total() < s.Hearth.Total() {
			s.Rank++
		}
	}
}

// tally adds up the progress of runs that go on at once. The first error ends
// all of them.
type tally struct {
	tell func(int) error

	mu      sync.Mutex
	arrived int
	err     error
}

func (t *tally) run(trace Trace, v Variation, p NamedPolicy, o Options) Outcome {
	arrived := 0
	o.Progress = func(n int) error {
		more := n - arrived
		arrived = n
		return t.add(more)
	}
	if o.Progress(0) != nil { // another run has failed
		return Outcome{}
	}
	r, err := Run(trace, v.World, p, o)
	if err != nil {
		t.fail(fmt.Errorf("%s: %w", v.where(), err))
		return Outcome{}
	}
	_ = o.Progress(len(trace.Jobs)) // the tally keeps its error
	return Outcome{r.Name, r.Infrastructure, r.Delay}
}

func (t *tally) add(arrived int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.arrived += arrived
	if t.err == nil && t.tell != nil {
		t.err = t.tell(t.arrived)
	}
	return t.err
}

// fail keeps the first error.
func (t *tally) fail(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
}

// parameter is one value of the world, for people.
type parameter struct {
	name, doc string
	text      func(World) string
	scale     func(*World, float64)
}

const parkedPrice = "parked price"

// parameters are those that can be half or double; MaxNodes is a limit that a
// person sets.
func parameters() []parameter {
	return []parameter{
		duration("boot", "from launching a node until it runs jobs", func(w *World) *time.Duration { return &w.Boot }),
		duration("resume", "from resuming a parked node until it runs jobs", func(w *World) *time.Duration { return &w.Resume }),
		duration("release lag", "for which a node that is parked or let go still costs its price", func(w *World) *time.Duration { return &w.ReleaseLag }),
		price("price", "of a running node", func(w *World) *float64 { return &w.Price }),
		price(parkedPrice, "of a stopped node that keeps its disk", func(w *World) *float64 { return &w.ParkedPrice }),
		count("slots", "jobs that a node runs at once", func(w *World) *int { return &w.Slots }),
		{
			"cold factor", "what a cold cache adds to a job, as a share of its duration",
			func(w World) string { return strconv.FormatFloat(w.ColdFactor, 'g', 4, 64) },
			func(w *World, factor float64) { w.ColdFactor *= factor },
		},
		count("keys held", "cache keys that an engine holds, the last used", func(w *World) *int { return &w.KeysHeld }),
		duration("warm for", "how long an unused key stays warm", func(w *World) *time.Duration { return &w.WarmFor }),
		price("delay price", "of a job that waits or is slowed", func(w *World) *float64 { return &w.DelayPrice }),
	}
}

func duration(name, doc string, of func(*World) *time.Duration) parameter {
	return parameter{
		name, doc,
		func(w World) string { return durationText(*of(&w)) },
		func(w *World, factor float64) {
			d := of(w)
			*d = time.Duration(float64(*d) * factor).Round(time.Second)
		},
	}
}

func price(name, doc string, of func(*World) *float64) parameter {
	return parameter{
		name, doc,
		func(w World) string { return "$" + priceText(*of(&w)) + "/h" },
		func(w *World, factor float64) { *of(w) *= factor },
	}
}

func count(name, doc string, of func(*World) *int) parameter {
	return parameter{
		name, doc,
		func(w World) string { return strconv.Itoa(*of(&w)) },
		func(w *World, factor float64) {
			n := of(w)
			*n = max(min(*n, 1), int(float64(*n)*factor))
		},
	}
}

func durationText(d time.Duration) string {
	switch {
	case d >= time.Hour && d%time.Hour == 0:
		return strconv.Itoa(int(d/time.Hour)) + " h"
	case d >= 10*time.Minute && d%time.Minute == 0:
		return strconv.Itoa(int(d/time.Minute)) + " min"
	}
	return strconv.Itoa(int(d/time.Second)) + " s"
}

// priceText has cents where there are any, and more digits where there are
// any.
func priceText(f float64) string {
	if f == math.Trunc(f) {
		return strconv.FormatFloat(f, 'f', 0, 64)
	}
	text := strconv.FormatFloat(math.Round(f*1e4)/1e4, 'f', -1, 64)
	if point := strings.IndexByte(text, '.'); point < 0 || len(text)-point < 3 {
		text = strconv.FormatFloat(f, 'f', 2, 64)
	}
	return text
}

// margin is the share by which the cheaper of hearth and the best other policy
// costs less: positive where hearth is the cheaper one, and 0 where nobody
// would call it a difference.
func (s Sensitive) margin() float64 {
	const even = 0.0005
	margin := 0.0
	switch ratio := s.Ratio(); {
	case ratio < 1:
		margin = 1 - ratio
	case ratio > 1:
		margin = 1/ratio - 1
	}
	if math.Abs(margin) < even {
		return 0
	}
	return margin
}

// wins says in words by how much hearth is the cheaper one.
func (s Sensitive) wins() string {
	switch m := 100 * s.margin(); {
	case m == 0:
		return "even"
	case m < 0:
		return fmt.Sprintf("loses by %.1f %%", -m)
	default:
		return fmt.Sprintf("%.1f %%", m)
	}
}

// where names the variation in words.
func (v Variation) where() string {
	if v.Parameter == "" {
		return "the world as given"
	}
	return v.Parameter + " " + v.Value
}

// sensitivityWords says where hearth wins, and then to whom it loses, by how
// much and where.
func sensitivityWords(all []Sensitive) []string {
	if len(all) == 0 {
		return nil
	}
	type loss struct {
		to          string
		least, most float64 // percent
		where       []string
	}
	var losses []loss
	lost, even := 0, 0
	for _, s := range all {
		percent := -100 * s.margin()
		if percent == 0 {
			even++
		}
		if percent <= 0 {
			continue
		}
		lost++
		i := slices.IndexFunc(losses, func(l loss) bool { return l.to == s.Best.Policy })
		if i < 0 {
			i = len(losses)
			losses = append(losses, loss{to: s.Best.Policy, least: percent})
		}
		l := &losses[i]
		l.least, l.most = min(l.least, percent), max(l.most, percent)
		l.where = append(l.where, s.where())
	}
	hearth := all[0].Hearth.Policy
	first := fmt.Sprintf("Of %d worlds, %s costs least in %d", len(all), hearth, len(all)-lost-even)
	switch {
	case lost+even == 0:
		first = fmt.Sprintf("In all %d worlds, %s costs least", len(all), hearth)
	case even > 0:
		first += fmt.Sprintf(", and as much as the best other policy in %d", even)
	}
	words := []string{first + "."}
	for _, l := range losses {
		percent := fmt.Sprintf("%.1f", l.least)
		if most := fmt.Sprintf("%.1f", l.most); most != percent {
			percent += " to " + most
		}
		words = append(words, fmt.Sprintf("%s costs %s %% less in: %s.", l.to, percent, strings.Join(l.where, ", ")))
	}
	return words
}
