package nodegroups

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Park says what to do instead of terminating a node that is worth keeping.
type Park string

// Ways to park.
const (
	ParkOff      Park = "off"
	ParkStop     Park = "stop"
	ParkWarmPool Park = "warm-pool"
)

// Settings are a group's annotations, interpreted. Every field has the default
// that a group without annotations gets (Defaults).
type Settings struct {
	Role model.Role
	// MinWarm and MaxWarm bound the idle nodes that are kept running.
	MinWarm, MaxWarm int
	// Schedule raises MinWarm at times of the week.
	Schedule []Window
	// MaxIdle, when set, is the longest that an idle node is kept running.
	MaxIdle *time.Duration
	Park    Park
	// MaxParked bounds the parked nodes, MaxParkedAge the age of one.
	MaxParked    int
	MaxParkedAge time.Duration
	JobsPerNode  int
	RunnerLabels []string
	// CacheKeys are the pod labels or annotations that make a cache key; none
	// means the default of the pod's CI system.
	CacheKeys   []string
	Prescale    bool
	PrescaleMax int
	// NodePrice in dollars an hour; nil means the instance type's list price.
	NodePrice *float64
	// ParkedPrice in dollars an hour; nil means that of the disk.
	ParkedPrice *float64
	// TimeValue is what an hour of waiting costs, in dollars.
	TimeValue   float64
	ColdPenalty time.Duration
	Options     Options
}

// Options are the per-group values of cluster-autoscaler's GetOptions that an
// annotation sets; nil leaves CA's own.
type Options struct {
	ScaleDownUtilizationThreshold    *float64
	ScaleDownGPUUtilizationThreshold *float64
	ScaleDownUnneededTime            *time.Duration
	ScaleDownUnreadyTime             *time.Duration
	MaxNodeProvisionTime             *time.Duration
	ZeroOrMaxNodeScaling             *bool
	IgnoreDaemonSetsUtilization      *bool
}

// Window is a part of the week in which at least MinWarm idle nodes are kept.
type Window struct {
	MinWarm  int
	Days     [7]bool // by time.Weekday
	From, To time.Duration
	Location *time.Location
}

// Contains says whether t is inside the window. From is inside, To is not. A
// window whose To is not after its From ends on the next day.
func (w Window) Contains(t time.Time) bool {
	t = t.In(w.Location)
	at := time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute + time.Duration(t.Second())*time.Second
	today, yesterday := t.Weekday(), (t.Weekday()+6)%7
	if w.From < w.To {
		return w.Days[today] && at >= w.From && at < w.To
	}
	return w.Days[today] && at >= w.From || w.Days[yesterday] && at < w.To
}

// MinWarmAt is the number of idle nodes to keep at t: min-warm or the highest
// window of the schedule that t is in, but never more than MaxWarm.
func (s Settings) MinWarmAt(t time.Time) int {
	n := s.MinWarm
	for _, w := range s.Schedule {
		if w.MinWarm > n && w.Contains(t) {
			n = w.MinWarm
		}
	}
	return min(n, s.MaxWarm)
}

// Runner says whether the group is one whose warmth Hearth looks after.
func (s Settings) Runner() bool { return s.Role == model.RoleRunner }

// AnnotationError is one annotation that could not be used. The group keeps
// working with that key's default.
type AnnotationError struct {
	Key, Value, Want string
}

func (e AnnotationError) Error() string {
	return fmt.Sprintf("annotation %s=%q: want %s; the default is used", e.Key, e.Value, e.Want)
}

// Merge lays annotations over each other, key by key: the first source that
// has a key wins. Keys outside Hearth's prefix are left out.
func Merge(sources ...map[string]string) map[string]string {
	merged := map[string]string{}
	for _, source := range slices.Backward(sources) {
		for k, v := range source {
			if strings.HasPrefix(k, model.Prefix+"/") {
				merged[k] = v
			}
		}
	}
	return merged
}

// Defaults returns the settings of a group without annotations.
func Defaults(group model.NodeGroup) Settings {
	return Settings{
		Role:         model.RolePlain,
		MaxWarm:      group.Max,
		Park:         ParkOff,
		MaxParked:    group.Max,
		MaxParkedAge: 168 * time.Hour,
		JobsPerNode:  1,
		Prescale:     true,
		PrescaleMax:  group.Max,
		TimeValue:    30,
		ColdPenalty:  3 * time.Minute,
	}
}

// runnerOptions are CA's options for a runner group unless an annotation says
// otherwise: the timer starts only after the plan released the node, and an
// engine that requests half of the node must not make it look busy.
func runnerOptions(o *Options) {
	if o.ScaleDownUnneededTime == nil {
		o.ScaleDownUnneededTime = new(10 * time.Second)
	}
	if o.IgnoreDaemonSetsUtilization == nil {
		o.IgnoreDaemonSetsUtilization = new(true)
	}
}

// Annotation describes one key for the reference in the docs.
type Annotation struct {
	Key, Values, Default, Meaning string
	set                           func(*Settings, string) (want string, ok bool)
}

// Annotations lists every key that Hearth understands, in the order of the
// reference.
func Annotations() []Annotation {
	return []Annotation{
		{"role", "runner, plain", "plain", "runner: Hearth keeps its warm nodes; plain: scaled exactly as by cluster-autoscaler's own providers", setRole},
		{"min-warm", "int", "0", "idle nodes kept running at least", count(func(s *Settings) *int { return &s.MinWarm }, 0)},
		{"max-warm", "int", "max", "idle nodes kept running at most", count(func(s *Settings) *int { return &s.MaxWarm }, 0)},
		{"max-idle", "duration", "policy", "an idle node is never kept running longer", optional(span, func(s *Settings) **time.Duration { return &s.MaxIdle }, wantSpan)},
		{"schedule", "`min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin; …`", "none", "min-warm by time of week", func(s *Settings, v string) (string, bool) {
			windows, ok := parseSchedule(v)
			s.Schedule = windows
			return "entries like \"min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin\" separated by \";\"", ok
		}},
		{"park", "off, stop, warm-pool", "off", "what to do instead of terminating a node that is worth keeping", func(s *Settings, v string) (string, bool) {
			s.Park = Park(v)
			return "off or stop (warm-pool needs a backend that has them)", s.Park == ParkOff || s.Park == ParkStop
		}},
		{"max-parked", "int", "max", "parked nodes at most", count(func(s *Settings) *int { return &s.MaxParked }, 0)},
		{"max-parked-age", "duration", "168h", "parked longer than this: gone", required(span, func(s *Settings) *time.Duration { return &s.MaxParkedAge }, wantSpan)},
		{"jobs-per-node", "int", "1", "runner slots on a node", count(func(s *Settings) *int { return &s.JobsPerNode }, 1)},
		{"runner-labels", "comma list", "none", "CI jobs with a subset of these labels run here", list(func(s *Settings) *[]string { return &s.RunnerLabels })},
		{"cache-keys", "comma list of pod label/annotation keys", "see policy", "what makes a job's cache key", list(func(s *Settings) *[]string { return &s.CacheKeys })},
		{"prescale", "off, on", "on", "launch nodes for queued jobs before their pods exist", func(s *Settings, v string) (string, bool) {
			s.Prescale = v == "on"
			return "off or on", v == "on" || v == "off"
		}},
		{"prescale-max", "int", "max", "hidden nodes at most", count(func(s *Settings) *int { return &s.PrescaleMax }, 0)},
		{"node-price", "$/h", "instance type's list price where the backend knows it, else 0.40", "price of a running node", optional(amount, func(s *Settings) **float64 { return &s.NodePrice }, wantAmount)},
		{"parked-price", "$/h", "3 % of node-price", "price of a parked node: its disks", optional(amount, func(s *Settings) **float64 { return &s.ParkedPrice }, wantAmount)},
		{"time-value", "$/h", "30", "what an hour of waiting costs", required(amount, func(s *Settings) *float64 { return &s.TimeValue }, wantAmount)},
		{"cold-penalty", "duration", "3m", "what a cold job loses, until measured", required(span, func(s *Settings) *time.Duration { return &s.ColdPenalty }, wantSpan)},
		{"scale-down-unneeded-time", "duration", "10s (plain: CA's)", "passed through GetOptions", optional(span, func(s *Settings) **time.Duration { return &s.Options.ScaleDownUnneededTime }, wantSpan)},
		{"scale-down-unready-time", "duration", "CA's", "passed through GetOptions", optional(span, func(s *Settings) **time.Duration { return &s.Options.ScaleDownUnreadyTime }, wantSpan)},
		{"scale-down-utilization-threshold", "0 to 1", "CA's", "passed through GetOptions", optional(fraction, func(s *Settings) **float64 { return &s.Options.ScaleDownUtilizationThreshold }, wantFraction)},
		{"scale-down-gpu-utilization-threshold", "0 to 1", "CA's", "passed through GetOptions", optional(fraction, func(s *Settings) **float64 { return &s.Options.ScaleDownGPUUtilizationThreshold }, wantFraction)},
		{"max-node-provision-time", "duration", "CA's", "passed through GetOptions", optional(span, func(s *Settings) **time.Duration { return &s.Options.MaxNodeProvisionTime }, wantSpan)},
		{"ignore-daemonsets-utilization", "true, false", "true (plain: CA's)", "passed through GetOptions", optional(boolean, func(s *Settings) **bool { return &s.Options.IgnoreDaemonSetsUtilization }, wantBool)},
		{"zero-or-max-node-scaling", "true, false", "CA's", "passed through GetOptions", optional(boolean, func(s *Settings) **bool { return &s.Options.ZeroOrMaxNodeScaling }, wantBool)},
	}
}

// ParseSettings interprets a group's merged annotations. It always returns
// usable settings: what cannot be used is reported, sorted by key, and its
// default stays. Keys that Hearth keeps elsewhere than on groups, and unknown
// ones, are reported too.
func ParseSettings(group model.NodeGroup, annotations map[string]string) (Settings, []AnnotationError) {
	known := map[string]Annotation{}
	for _, a := range Annotations() {
		known[model.Prefix+"/"+a.Key] = a
	}
	settings := Defaults(group)
	var problems []AnnotationError
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		value := annotations[key]
		a, ok := known[key]
		if !ok {
			problems = append(problems, AnnotationError{key, clip(value), "a key from the annotation reference"})
			continue
		}
		trial := settings
		if want, ok := a.set(&trial, strings.TrimSpace(value)); !ok {
			problems = append(problems, AnnotationError{key, clip(value), want})
			continue
		}
		settings = trial
	}
	if settings.Runner() {
		runnerOptions(&settings.Options)
	}
	return settings, problems
}

// Interpret returns the settings of a group whose RunnerNodeGroup carries
// annotations beside those that it was declared with. The object's win, but for
// a role that cannot be used: the default would take the protection off every
// node of a runner group, so the declared role stays.
func Interpret(group model.NodeGroup, object map[string]string) (Settings, []AnnotationError) {
	const role = model.Prefix + "/role"
	if value, has := object[role]; has {
		trial := Settings{}
		if want, ok := setRole(&trial, strings.TrimSpace(value)); !ok {
			object = maps.Clone(object)
			delete(object, role)
			settings, problems := ParseSettings(group, Merge(object, group.Annotations))
			want += ", as declared until then"
			return settings, append([]AnnotationError{{role, clip(value), want}}, problems...)
		}
	}
	return ParseSettings(group, Merge(object, group.Annotations))
}

func setRole(s *Settings, v string) (string, bool) {
	s.Role = model.Role(v)
	return "runner or plain", s.Role == model.RoleRunner || s.Role == model.RolePlain
}

// clip bounds what a bad value may put into logs and conditions.
func clip(v string) string {
	const most = 80
	if len(v) <= most {
		return v
	}
	return strings.ToValidUTF8(v[:most], "") + "…"
}

const (
	wantSpan     = "a duration such as 90s, 15m or 24h, at most 8760h"
	wantAmount   = "dollars an hour, 0 to 10000"
	wantFraction = "a number from 0 to 1"
	wantBool     = "true or false"
)

func span(v string) (time.Duration, bool) {
	d, err := time.ParseDuration(v)
	return d, err == nil && d >= 0 && d <= 8760*time.Hour
}

func within(v string, high float64) (float64, bool) {
	f, err := strconv.ParseFloat(v, 64)
	return f, err == nil && !math.IsNaN(f) && f >= 0 && f <= high
}

func amount(v string) (float64, bool)   { return within(v, 10000) }
func fraction(v string) (float64, bool) { return within(v, 1) }
func boolean(v string) (bool, bool)     { return v == "true", v == "true" || v == "false" }

type setter = func(*Settings, string) (string, bool)

func required[T any](parse func(string) (T, bool), field func(*Settings) *T, want string) setter {
	return func(s *Settings, v string) (string, bool) {
		value, ok := parse(v)
		*field(s) = value
		return want, ok
	}
}

func optional[T any](parse func(string) (T, bool), field func(*Settings) **T, want string) setter {
	return func(s *Settings, v string) (string, bool) {
		value, ok := parse(v)
		*field(s) = &value
		return want, ok
	}
}

func count(field func(*Settings) *int, low int) setter {
	const high = 100000
	return required(func(v string) (int, bool) {
		n, err := strconv.Atoi(v)
		return n, err == nil && n >= low && n <= high
	}, field, fmt.Sprintf("a whole number from %d to %d", low, high))
}

func list(field func(*Settings) *[]string) setter {
	const most = 64
	return func(s *Settings, v string) (string, bool) {
		var items []string
		for item := range strings.SplitSeq(v, ",") {
			if item = strings.TrimSpace(item); item != "" {
				items = append(items, item)
			}
		}
		*field(s) = items
		return fmt.Sprintf("a comma-separated list of at most %d items", most), len(items) > 0 && len(items) <= most
	}
}

// parseSchedule reads "min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin; …". The
// time zone may be left out and is UTC then.
func parseSchedule(v string) ([]Window, bool) {
	var windows []Window
	for entry := range strings.SplitSeq(v, ";") {
		fields := strings.Fields(entry)
		if len(fields) == 0 {
			continue
		}
		if len(fields) < 3 || len(fields) > 4 || len(windows) == 32 {
			return nil, false
		}
		w := Window{Location: time.UTC}
		number, found := strings.CutPrefix(fields[0], "min-warm=")
		n, err := strconv.Atoi(number)
		if !found || err != nil || n < 0 || n > 100000 {
			return nil, false
		}
		w.MinWarm = n
		var ok bool
		if w.Days, ok = parseDays(fields[1]); !ok {
			return nil, false
		}
		from, to, found := strings.Cut(fields[2], "-")
		if w.From, ok = parseClock(from); !ok || !found {
			return nil, false
		}
		if w.To, ok = parseClock(to); !ok || w.From-w.To == 24*time.Hour { // nothing is between 24:00 and 0:00
			return nil, false
		}
		if len(fields) == 4 {
			if w.Location, err = time.LoadLocation(fields[3]); err != nil || fields[3] == "Local" {
				return nil, false
			}
		}
		windows = append(windows, w)
	}
	return windows, len(windows) > 0
}

// parseDays reads "Mon-Fri", "Sat", "Mon,Wed,Fri" or "Fri-Mon".
func parseDays(v string) (days [7]bool, ok bool) {
	for part := range strings.SplitSeq(v, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, ok1 := parseDay(first)
		to, ok2 := parseDay(last)
		if !ok1 || !ok2 {
			return days, false
		}
		for d := from; ; d = (d + 1) % 7 {
			days[d] = true
			if d == to {
				break
			}
		}
	}
	return days, true
}

func parseDay(v string) (time.Weekday, bool) {
	for d := time.Sunday; d <= time.Saturday; d++ {
		if strings.EqualFold(v, d.String()[:3]) {
			return d, true
		}
	}
	return 0, false
}

// parseClock reads "08:00"; "24:00" is the end of the day.
func parseClock(v string) (time.Duration, bool) {
	hours, minutes, found := strings.Cut(v, ":")
	h, err1 := strconv.ParseUint(hours, 10, 8) // takes no sign
	m, err2 := strconv.ParseUint(minutes, 10, 8)
	if !found || err1 != nil || err2 != nil || len(hours) > 2 || len(minutes) != 2 || m > 59 || h > 24 || h == 24 && m > 0 {
		return 0, false
	}
	return time.Duration(h)*time.Hour + time.Duration(m)*time.Minute, true
}
