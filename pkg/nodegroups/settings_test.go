package nodegroups

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the zones of the tables, on any machine

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/model"
)

var ofTen = model.NodeGroup{ID: "runners", Min: 1, Max: 10}

// sameSettings compares settings; zones by name.
func sameSettings(a, b Settings) string {
	return cmp.Diff(a, b, cmp.Comparer(func(a, b *time.Location) bool { return a.String() == b.String() }))
}

// annotated is ParseSettings for keys without their prefix.
func annotated(pairs ...string) (Settings, []AnnotationError) {
	annotations := map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		annotations[model.Prefix+"/"+pairs[i]] = pairs[i+1]
	}
	return ParseSettings(ofTen, annotations)
}

func TestDefaults(t *testing.T) {
	got, problems := ParseSettings(ofTen, nil)
	want := Settings{
		Role: model.RolePlain, MaxWarm: 10, Park: ParkOff, MaxParked: 10, MaxParkedAge: 7 * 24 * time.Hour,
		JobsPerNode: 1, Prescale: true, PrescaleMax: 10, TimeValue: 30, ColdPenalty: 3 * time.Minute,
	}
	if diff := sameSettings(want, got); diff != "" || len(problems) > 0 {
		t.Errorf("no annotations: %v\n%s", problems, diff)
	}
	// A runner group's options differ from cluster-autoscaler's own.
	got, _ = annotated("role", "runner")
	want.Role = model.RoleRunner
	want.Options = Options{ScaleDownUnneededTime: new(10 * time.Second), IgnoreDaemonSetsUtilization: new(true)}
	if diff := sameSettings(want, got); diff != "" {
		t.Errorf("a runner group:\n%s", diff)
	}
	got, _ = annotated("role", "runner", "scale-down-unneeded-time", "1m", "ignore-daemonsets-utilization", "false")
	want.Options = Options{ScaleDownUnneededTime: new(time.Minute), IgnoreDaemonSetsUtilization: new(false)}
	if diff := sameSettings(want, got); diff != "" {
		t.Errorf("a runner group with options of its own:\n%s", diff)
	}
}

// TestAnnotations tries every key with values that it takes and values that it
// does not.
func TestAnnotations(t *testing.T) {
	spans := []string{"", "5", "-1s", "8761h", "1y", "9999999h", "∞"}
	counts := []string{"", "-1", "1.5", "100001", "many", "99999999999999999999", "0x10"}
	amounts := []string{"", "-0.01", "10000.01", "$3", "NaN", "+Inf", "1,5"}
	fractions := []string{"", "-0.1", "1.01", "50%", "NaN", "inf"}
	bools := []string{"", "yes", "True", "1", "on"}
	type good struct {
		value string
		set   func(*Settings)
	}
	tests := map[string]struct {
		good []good
		bad  []string
	}{
		"role": {
			[]good{{"plain", func(*Settings) {}}, {" plain ", func(*Settings) {}}},
			[]string{"", "Runner", "worker"},
		},
		"min-warm": {[]good{{"0", func(*Settings) {}}, {"3", func(s *Settings) { s.MinWarm = 3 }}}, counts},
		"max-warm": {[]good{{"0", func(s *Settings) { s.MaxWarm = 0 }}, {"100000", func(s *Settings) { s.MaxWarm = 100000 }}}, counts},
		"max-idle": {[]good{{"0s", func(s *Settings) { s.MaxIdle = new(time.Duration(0)) }}, {"1h30m", func(s *Settings) { s.MaxIdle = new(90 * time.Minute) }}}, spans},
		"schedule": {
			[]good{{"min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin;", func(s *Settings) {
				berlin, _ := time.LoadLocation("Europe/Berlin")
				s.Schedule = []Window{{
					MinWarm: 4, Days: [7]bool{time.Monday: true, time.Tuesday: true, time.Wednesday: true, time.Thursday: true, time.Friday: true},
					From: 8 * time.Hour, To: 19 * time.Hour, Location: berlin,
				}}
			}}},
			[]string{"", ";", "always", "Mon-Fri 08:00-19:00"},
		},
		"park": {
			[]good{{"off", func(*Settings) {}}, {"stop", func(s *Settings) { s.Park = ParkStop }}},
			[]string{"", "warm-pool", "Stop", "true"},
		},
		"max-parked":     {[]good{{"0", func(s *Settings) { s.MaxParked = 0 }}}, counts},
		"max-parked-age": {[]good{{"24h", func(s *Settings) { s.MaxParkedAge = 24 * time.Hour }}, {"8760h", func(s *Settings) { s.MaxParkedAge = 8760 * time.Hour }}}, spans},
		"jobs-per-node":  {[]good{{"4", func(s *Settings) { s.JobsPerNode = 4 }}}, append([]string{"0"}, counts...)},
		"runner-labels": {
			[]good{{"linux", func(s *Settings) { s.RunnerLabels = []string{"linux"} }}, {" linux, x64 ,,gpu", func(s *Settings) { s.RunnerLabels = []string{"linux", "x64", "gpu"} }}},
			[]string{"", " ", ",", strings.Repeat("a,", 65)},
		},
		"cache-keys": {[]good{{"actions.github.com/scale-set-name", func(s *Settings) { s.CacheKeys = []string{"actions.github.com/scale-set-name"} }}}, []string{"", ","}},
		"prescale": {
			[]good{{"on", func(*Settings) {}}, {"off", func(s *Settings) { s.Prescale = false }}},
			[]string{"", "true", "false", "Off"},
		},
		"prescale-max":                         {[]good{{"2", func(s *Settings) { s.PrescaleMax = 2 }}}, counts},
		"node-price":                           {[]good{{"0", func(s *Settings) { s.NodePrice = new(0.0) }}, {"0.4", func(s *Settings) { s.NodePrice = new(0.4) }}}, amounts},
		"parked-price":                         {[]good{{"0.02", func(s *Settings) { s.ParkedPrice = new(0.02) }}}, amounts},
		"time-value":                           {[]good{{"10000", func(s *Settings) { s.TimeValue = 10000 }}}, amounts},
		"cold-penalty":                         {[]good{{"90s", func(s *Settings) { s.ColdPenalty = 90 * time.Second }}}, spans},
		"scale-down-unneeded-time":             {[]good{{"10s", func(s *Settings) { s.Options.ScaleDownUnneededTime = new(10 * time.Second) }}}, spans},
		"scale-down-unready-time":              {[]good{{"20m", func(s *Settings) { s.Options.ScaleDownUnreadyTime = new(20 * time.Minute) }}}, spans},
		"scale-down-utilization-threshold":     {[]good{{"0.5", func(s *Settings) { s.Options.ScaleDownUtilizationThreshold = new(0.5) }}, {"1", func(s *Settings) { s.Options.ScaleDownUtilizationThreshold = new(1.0) }}}, fractions},
		"scale-down-gpu-utilization-threshold": {[]good{{"0", func(s *Settings) { s.Options.ScaleDownGPUUtilizationThreshold = new(0.0) }}}, fractions},
		"max-node-provision-time":              {[]good{{"15m", func(s *Settings) { s.Options.MaxNodeProvisionTime = new(15 * time.Minute) }}}, spans},
		"ignore-daemonsets-utilization":        {[]good{{"true", func(s *Settings) { s.Options.IgnoreDaemonSetsUtilization = new(true) }}}, bools},
		"zero-or-max-node-scaling":             {[]good{{"false", func(s *Settings) { s.Options.ZeroOrMaxNodeScaling = new(false) }}}, bools},
	}
	for _, a := range Annotations() {
		tt, ok := tests[a.Key]
		if !ok {
			t.Errorf("no test for %s", a.Key)
			continue
		}
		delete(tests, a.Key)
		for _, g := range tt.good {
			want := Defaults(ofTen)
			g.set(&want)
			got, problems := annotated(a.Key, g.value)
			if diff := sameSettings(want, got); diff != "" || len(problems) > 0 {
				t.Errorf("%s=%q: %v\n%s", a.Key, g.value, problems, diff)
			}
		}
		for _, value := range tt.bad {
			got, problems := annotated(a.Key, value)
			if diff := sameSettings(Defaults(ofTen), got); diff != "" {
				t.Errorf("%s=%q changed the settings:\n%s", a.Key, value, diff)
			}
			if len(problems) != 1 || problems[0].Key != model.Prefix+"/"+a.Key || problems[0].Want == "" {
				t.Errorf("%s=%q was reported as %v", a.Key, value, problems)
			}
		}
	}
	for key := range tests {
		t.Errorf("%s is no annotation any more", key)
	}
}

func TestBadAnnotationsAreReportedAndTheOthersUsed(t *testing.T) {
	got, problems := ParseSettings(ofTen, map[string]string{
		"hearth.dev/min-warm":   "two",
		"hearth.dev/max-parked": "3",
		"hearth.dev/minwarm":    "2",
		"hearth.dev/decision":   "keep",
		"hearth.dev/schedule":   strings.Repeat("é", 100),
	})
	want := Defaults(ofTen)
	want.MaxParked = 3
	if diff := sameSettings(want, got); diff != "" {
		t.Errorf("settings:\n%s", diff)
	}
	var texts []string
	for _, p := range problems {
		texts = append(texts, p.Error())
	}
	wantTexts := []string{
		`annotation hearth.dev/decision="keep": want a key from the annotation reference; the default is used`,
		`annotation hearth.dev/min-warm="two": want a whole number from 0 to 100000; the default is used`,
		`annotation hearth.dev/minwarm="2": want a key from the annotation reference; the default is used`,
		`annotation hearth.dev/schedule="` + strings.Repeat("é", 40) + `…": want entries like "min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin" separated by ";"; the default is used`,
	}
	if diff := cmp.Diff(wantTexts, texts); diff != "" {
		t.Error(diff)
	}
}

func TestMerge(t *testing.T) {
	object := map[string]string{"hearth.dev/min-warm": "2", "kubectl.kubernetes.io/last-applied-configuration": "{}"}
	config := map[string]string{"hearth.dev/min-warm": "3", "hearth.dev/park": "stop"}
	tags := map[string]string{"hearth.dev/park": "off", "hearth.dev/role": "runner", "hearth.development/x": "y", "Name": "runners"}
	got := Merge(object, config, nil, tags)
	want := map[string]string{"hearth.dev/min-warm": "2", "hearth.dev/park": "stop", "hearth.dev/role": "runner"}
	if !maps.Equal(got, want) {
		t.Errorf("merged %v, want %v", got, want)
	}
	// The first source that has a key wins even when its value is of no use.
	settings, problems := ParseSettings(ofTen, Merge(map[string]string{"hearth.dev/min-warm": "x"}, map[string]string{"hearth.dev/min-warm": "3"}))
	if settings.MinWarm != 0 || len(problems) != 1 {
		t.Errorf("min-warm %d, %v", settings.MinWarm, problems)
	}
}

func TestScheduleSyntax(t *testing.T) {
	good := map[string]string{
		"min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin":                                  "4 _MTWTF_ 8h0m0s 19h0m0s Europe/Berlin",
		"min-warm=0 sun 00:00-24:00":                                                    "0 S______ 0s 24h0m0s UTC",
		"  min-warm=1   Fri-Mon 22:00-6:00  ":                                           "1 SM___FS 22h0m0s 6h0m0s UTC",
		"min-warm=2 Mon,WED,fri 09:30-09:30 Asia/Kolkata;; min-warm=1 Sat 10:00-11:00;": "2 _M_W_F_ 9h30m0s 9h30m0s Asia/Kolkata; 1 ______S 10h0m0s 11h0m0s UTC",
	}
	for v, want := range good {
		windows, ok := parseSchedule(v)
		if got := describe(windows); !ok || got != want {
			t.Errorf("%q is %q (%v), want %q", v, got, ok, want)
		}
	}
	for _, v := range []string{
		"", ";", "min-warm=4", "min-warm=4 Mon", "min-warm=4 Mon 08:00-19:00 Europe/Berlin x",
		"4 Mon 08:00-19:00", "min-warm= Mon 08:00-19:00", "min-warm=-1 Mon 08:00-19:00", "min-warm=100001 Mon 08:00-19:00",
		"min-warm=1 Monday 08:00-19:00", "min-warm=1 Mon- 08:00-19:00", "min-warm=1 , 08:00-19:00", "min-warm=1 Mon-Tue-Wed 08:00-19:00",
		"min-warm=1 Mon 08:00", "min-warm=1 Mon 8-19", "min-warm=1 Mon 08:60-19:00", "min-warm=1 Mon 25:00-26:00", "min-warm=1 Mon 24:01-08:00", "min-warm=1 Mon 24:00-0:00", "min-warm=1 Mon 8:0-19:00",
		"min-warm=1 Mon +8:00-19:00", "min-warm=1 Mon -0:00-19:00", "min-warm=1 Mon 08:00--0:00", "min-warm=1 Mon 08:+0-19:00", "min-warm=1 Mon 008:00-19:00", "min-warm=1 Mon 08:00-19:00-20:00",
		"min-warm=1 Mon 08:00-19:00 Berlin", "min-warm=1 Mon 08:00-19:00 Local", "min-warm=1 Mon 08:00-19:00 ../UTC",
		strings.Repeat("min-warm=1 Mon 08:00-19:00;", 33),
	} {
		if windows, ok := parseSchedule(v); ok || windows != nil {
			t.Errorf("%q was taken as %q", v, describe(windows))
		}
	}
}

func describe(windows []Window) string {
	var all []string
	for _, w := range windows {
		days := ""
		for d, on := range w.Days {
			if on {
				days += time.Weekday(d).String()[:1]
			} else {
				days += "_"
			}
		}
		all = append(all, fmt.Sprintf("%d %s %v %v %v", w.MinWarm, days, w.From, w.To, w.Location))
	}
	return strings.Join(all, "; ")
}

func TestWindowContains(t *testing.T) {
	tests := []struct {
		window  string
		at      string // with its offset
		inside  bool
		because string
	}{
		{"Mon-Fri 08:00-19:00", "2026-01-05T08:00:00Z", true, "from is inside"},
		{"Mon-Fri 08:00-19:00", "2026-01-05T07:59:59Z", false, "before from"},
		{"Mon-Fri 08:00-19:00", "2026-01-05T18:59:59Z", true, "before to"},
		{"Mon-Fri 08:00-19:00", "2026-01-05T19:00:00Z", false, "to is outside"},
		{"Mon-Fri 08:00-19:00", "2026-01-04T12:00:00Z", false, "a Sunday"},
		{"Mon-Fri 08:00-19:00", "2026-01-05T20:00:00+05:00", true, "15:00 UTC, whatever the zone of the question"},
		{"Mon-Fri 08:00-19:00 Asia/Tokyo", "2026-01-04T23:00:00Z", true, "Monday 08:00 in Tokyo"},
		{"Mon-Fri 08:00-19:00 Asia/Tokyo", "2026-01-09T10:00:00Z", false, "Friday 19:00 in Tokyo"},
		{"Mon-Fri 08:00-19:00 America/St_Johns", "2026-01-05T11:30:00Z", true, "08:00 in St. John's, half an hour off"},
		// Over midnight: the day is that of the beginning.
		{"Fri 22:00-06:00", "2026-01-09T22:00:00Z", true, "Friday night"},
		{"Fri 22:00-06:00", "2026-01-10T05:59:59Z", true, "Saturday morning belongs to Friday night"},
		{"Fri 22:00-06:00", "2026-01-10T06:00:00Z", false, "it has ended"},
		{"Fri 22:00-06:00", "2026-01-09T05:00:00Z", false, "Friday morning belongs to Thursday night"},
		{"Sat 22:00-06:00", "2026-01-11T03:00:00Z", true, "over the end of the week"},
		{"Sun 22:00-06:00", "2026-01-05T03:00:00Z", true, "over the beginning of the week"},
		// Whole days.
		{"Sun 00:00-24:00", "2026-01-04T23:59:59Z", true, "the last second of a day"},
		{"Sun 00:00-24:00", "2026-01-05T00:00:00Z", false, "the first of the next"},
		{"Sun 12:00-12:00", "2026-01-05T11:59:59Z", true, "24 hours from Sunday noon"},
		{"Sun 12:00-12:00", "2026-01-05T12:00:00Z", false, "and no longer"},
		// The clocks go forward on 2026-03-29 and back on 2026-10-25.
		{"Sat 22:00-06:00 Europe/Berlin", "2026-03-29T03:59:59Z", true, "05:59:59 in summer time"},
		{"Sat 22:00-06:00 Europe/Berlin", "2026-03-29T04:00:00Z", false, "06:00 in summer time: the night was an hour shorter"},
		{"Sat 22:00-06:00 Europe/Berlin", "2026-10-25T04:59:59Z", true, "05:59:59 in winter time: the night was an hour longer"},
		{"Sun 02:00-03:00 Europe/Berlin", "2026-03-29T00:59:59Z", false, "01:59:59, a second before the hour that is left out"},
		{"Sun 02:00-03:00 Europe/Berlin", "2026-03-29T01:00:00Z", false, "03:00 at once"},
		{"Sun 02:00-03:00 Europe/Berlin", "2026-10-25T00:30:00Z", true, "02:30 for the first time"},
		{"Sun 02:00-03:00 Europe/Berlin", "2026-10-25T01:30:00Z", true, "02:30 for the second time"},
		{"Mon 08:00-19:00 Europe/Berlin", "2026-03-30T06:00:00Z", true, "08:00 in summer time"},
		{"Mon 08:00-19:00 Europe/Berlin", "2026-10-26T06:30:00Z", false, "07:30 in winter time"},
	}
	for _, tt := range tests {
		windows, ok := parseSchedule("min-warm=1 " + tt.window)
		at, err := time.Parse(time.RFC3339, tt.at)
		if !ok || err != nil {
			t.Fatalf("%s, %s: %v", tt.window, tt.at, err)
		}
		if got := windows[0].Contains(at); got != tt.inside {
			t.Errorf("%s contains %s: %v, want %v: %s", tt.window, tt.at, got, tt.inside, tt.because)
		}
	}
}

func TestMinWarmAt(t *testing.T) {
	at := func(hour int) time.Time { return time.Date(2026, 1, 5, hour, 0, 0, 0, time.UTC) }
	s, problems := annotated("min-warm", "1", "max-warm", "5", "schedule",
		"min-warm=3 Mon 08:00-20:00; min-warm=9 Mon 12:00-13:00; min-warm=0 Mon 18:00-19:00")
	if len(problems) > 0 {
		t.Fatal(problems)
	}
	for hour, want := range map[int]int{7: 1, 8: 3, 12: 5, 18: 3, 20: 1} {
		if got := s.MinWarmAt(at(hour)); got != want {
			t.Errorf("at %d: %d warm nodes, want %d", hour, got, want)
		}
	}
}

// FuzzParseSettings: whatever the annotations, settings come out that can be
// used, and each that cannot is reported under its key and leaves its default.
func FuzzParseSettings(f *testing.F) {
	f.Add("role", "runner", "min-warm", "4")
	f.Add("schedule", "min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin; min-warm=1 Sat 10:00-16:00", "park", "stop")
	f.Add("max-idle", "15m", "node-price", "0.40")
	f.Add("time-value", "1e309", "scale-down-utilization-threshold", "NaN")
	f.Add("runner-labels", "a,b,,c", "unknown", "\xff\x00")
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2 string) {
		annotations := Merge(map[string]string{model.Prefix + "/" + key1: value1, model.Prefix + "/" + key2: value2})
		got, problems := ParseSettings(ofTen, annotations)
		usable := maps.Clone(annotations)
		for _, p := range problems {
			if _, ok := usable[p.Key]; !ok {
				t.Errorf("a problem with %q, which is not there or was reported before", p.Key)
			}
			delete(usable, p.Key)
			if text := p.Error(); !strings.Contains(text, p.Key) || len(text) > len(p.Key)+600 {
				t.Errorf("the problem with %q reads %q", p.Key, text)
			}
		}
		if !slices.IsSortedFunc(problems, func(a, b AnnotationError) int { return strings.Compare(a.Key, b.Key) }) {
			t.Errorf("problems are not sorted: %v", problems)
		}
		again, rest := ParseSettings(ofTen, usable)
		if diff := sameSettings(again, got); diff != "" || len(rest) > 0 {
			t.Errorf("without the bad keys it differs: %v\n%s", rest, diff)
		}
		if err := sane(got); err != nil {
			t.Error(err)
		}
	})
}

func sane(s Settings) error {
	for _, n := range []int{s.MinWarm, s.MaxWarm, s.MaxParked, s.PrescaleMax, s.JobsPerNode - 1} {
		if n < 0 || n > 100000 {
			return fmt.Errorf("a count of %d in %+v", n, s)
		}
	}
	spans := []time.Duration{s.MaxParkedAge, s.ColdPenalty}
	for _, d := range []*time.Duration{s.MaxIdle, s.Options.ScaleDownUnneededTime, s.Options.ScaleDownUnreadyTime, s.Options.MaxNodeProvisionTime} {
		if d != nil {
			spans = append(spans, *d)
		}
	}
	for _, d := range spans {
		if d < 0 || d > 8760*time.Hour {
			return fmt.Errorf("a duration of %v in %+v", d, s)
		}
	}
	numbers := []float64{s.TimeValue}
	for _, f := range []*float64{s.NodePrice, s.Options.ScaleDownUtilizationThreshold, s.Options.ScaleDownGPUUtilizationThreshold} {
		if f != nil {
			numbers = append(numbers, *f)
		}
	}
	for _, f := range numbers {
		if math.IsNaN(f) || f < 0 || f > 10000 {
			return fmt.Errorf("a number of %v in %+v", f, s)
		}
	}
	if s.Role != model.RolePlain && s.Role != model.RoleRunner {
		return fmt.Errorf("a role of %q", s.Role)
	}
	if n := s.MinWarmAt(time.Date(2026, 1, 5, 12, 0, 0, 0, time.UTC)); n > s.MaxWarm {
		return fmt.Errorf("%d warm nodes of at most %d", n, s.MaxWarm)
	}
	return nil
}

// FuzzSchedule: what is taken can be written down again and means the same.
func FuzzSchedule(f *testing.F) {
	f.Add("min-warm=4 Mon-Fri 08:00-19:00 Europe/Berlin; min-warm=1 Sat,Sun 22:00-6:00")
	f.Add("min-warm=0 Fri-Mon 00:00-24:00 UTC")
	f.Add("min-warm=0 Sun 24:00-0:00")
	f.Add("min-warm=0 Sun 23:30-0:00")
	f.Add("min-warm=1 Sun 02:00-02:00 America/New_York;")
	f.Fuzz(func(t *testing.T, v string) {
		windows, ok := parseSchedule(v)
		if !ok {
			if windows != nil {
				t.Errorf("%q is no schedule and still %v", v, windows)
			}
			return
		}
		var entries []string
		for _, w := range windows {
			var days []string
			for d, on := range w.Days {
				if on {
					days = append(days, time.Weekday(d).String()[:3])
				}
			}
			if w.MinWarm < 0 || w.From < 0 || w.From > 24*time.Hour || w.To < 0 || w.To > 24*time.Hour || len(days) == 0 {
				t.Fatalf("%q became %+v", v, w)
			}
			entries = append(entries, fmt.Sprintf("min-warm=%d %s %s-%s %s", w.MinWarm, strings.Join(days, ","), clock(w.From), clock(w.To), w.Location))
			inside := 0
			for hour := range 7 * 24 {
				if w.Contains(time.Date(2026, 1, 5, hour, 0, 0, 0, time.UTC)) {
					inside++
				}
			}
			long := w.To - w.From
			if long <= 0 {
				long += 24 * time.Hour
			}
			if inside == 0 && long > time.Hour {
				t.Errorf("%q: no hour of the week is in %+v", v, w)
			}
		}
		again, ok := parseSchedule(strings.Join(entries, "; "))
		if diff := sameSettings(Settings{Schedule: windows}, Settings{Schedule: again}); !ok || diff != "" {
			t.Errorf("%q written down again:\n%s", v, diff)
		}
	})
}

func clock(d time.Duration) string {
	return fmt.Sprintf("%02d:%02d", int(d.Hours()), int(d.Minutes())%60)
}

// A role that cannot be used leaves the declared one: the default would take
// the protection off every node.
func TestInterpretKeepsDeclaredRole(t *testing.T) {
	group := ofTen
	group.Annotations = map[string]string{"hearth.dev/role": "runner", "hearth.dev/min-warm": "2"}
	settings, problems := Interpret(group, map[string]string{"hearth.dev/role": "Runner", "hearth.dev/min-warm": "3"})
	if settings.Role != model.RoleRunner || settings.MinWarm != 3 {
		t.Errorf("role %q and min-warm %d, want runner and 3", settings.Role, settings.MinWarm)
	}
	if len(problems) != 1 || problems[0].Key != "hearth.dev/role" {
		t.Errorf("problems %v, want one about the role", problems)
	}
	if settings, problems := Interpret(group, map[string]string{"hearth.dev/role": "plain"}); settings.Role != model.RolePlain || problems != nil {
		t.Errorf("a valid role does not win: %q, %v", settings.Role, problems)
	}
}
