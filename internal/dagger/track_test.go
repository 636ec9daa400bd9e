package dagger

import (
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/hearth-ci/hearth/pkg/model"
)

// story tells a tracker of one node's readings, thirty seconds apart.
type story struct {
	t       *testing.T
	tracker *Tracker
	now     time.Time
	reading model.EngineReading // the next
}

func newStory(t *testing.T) *story {
	return &story{t: t, tracker: NewTracker(), now: start, reading: model.EngineReading{Node: "n", Pod: "dagger/x", CacheBytes: 40 << 30}}
}

func (s *story) read() Change {
	s.now = s.now.Add(30 * time.Second)
	s.reading.At = s.now
	return s.tracker.Observe(s.reading)
}

func (s *story) state() State { return s.tracker.State("n", s.now) }

// clients reads once for each number; negative ones are readings that failed.
func (s *story) clients(numbers ...int) *story {
	for _, n := range numbers {
		s.reading.Clients, s.reading.Unknown = n, ""
		if n < 0 {
			s.reading.Clients, s.reading.Unknown = 0, "no answer in time"
		}
		s.read()
	}
	return s
}

func (s *story) want(activity Activity, quiet int, reason string) {
	s.t.Helper()
	if got := s.state(); got.Activity != activity || got.Quiet != quiet || got.Reason != reason {
		s.t.Errorf("%v, quiet %d, %q; want %v, %d, %q", got.Activity, got.Quiet, got.Reason, activity, quiet, reason)
	}
}

func TestActivity(t *testing.T) {
	for name, tt := range map[string]struct {
		clients  []int
		activity Activity
		quiet    int
		reason   string
	}{
		"never read":            {nil, Unknown, 0, "never read"},
		"one client":            {[]int{1}, Unknown, 0, "too few readings"},
		"two with a client":     {[]int{1, 3}, Busy, 0, ""},
		"two without":           {[]int{0, 0}, Unknown, 2, "too few readings"},
		"three without":         {[]int{0, 0, 0}, Idle, 3, ""},
		"now and then a probe":  {[]int{0, 0, 0, 1, 0, 1, 0, 0, 1}, Idle, 0, ""},
		"idle, then busy":       {[]int{0, 0, 0, 1, 1}, Busy, 0, ""},
		"busy, a gap":           {[]int{1, 1, 0, 0}, Busy, 2, ""},
		"busy, then idle":       {[]int{1, 1, 0, 0, 0}, Idle, 3, ""},
		"never settles":         {[]int{1, 0, 1, 0, 0, 1}, Unknown, 0, "too few readings"},
		"fails at first":        {[]int{-1}, Unknown, 0, "no answer in time"},
		"idle, one fails":       {[]int{0, 0, 0, -1}, Idle, 0, "no answer in time"},
		"idle, some fail":       {[]int{0, 0, 0, -1, -1, -1, -1}, Idle, 0, "no answer in time"},
		"idle, too many fail":   {[]int{0, 0, 0, -1, -1, -1, -1, -1}, Unknown, 0, "no answer in time"},
		"failure breaks a row":  {[]int{0, 0, -1, 0}, Unknown, 1, "too few readings"},
		"failure breaks a pair": {[]int{1, -1, 1}, Unknown, 0, "too few readings"},
	} {
		t.Run(name, func(t *testing.T) {
			newStory(t).clients(tt.clients...).want(tt.activity, tt.quiet, tt.reason)
		})
	}
}

func TestReadingsGrowOld(t *testing.T) {
	s := newStory(t).clients(0, 0, 0)
	s.now = s.now.Add(staleAfter)
	s.want(Idle, 3, "")
	s.now = s.now.Add(time.Second)
	s.want(Unknown, 0, "not read for 2m1s")
	if s.state().Verified {
		t.Error("an old reading verifies the cache")
	}
	s.clients(0) // what was before the gap does not count
	s.want(Unknown, 1, "too few readings")
}

func TestReadingsOutOfOrder(t *testing.T) {
	s := newStory(t).clients(0, 0, 0)
	late := s.reading
	late.At, late.Clients = s.now.Add(-time.Second), 5
	for range 3 {
		s.tracker.Observe(late)
		s.tracker.Observe(s.reading) // the newest once more
	}
	s.want(Idle, 3, "")
	if got := s.state().Reading; got != s.reading {
		t.Errorf("the newest is %+v; want %+v", got, s.reading)
	}
}

func TestAnotherPodStartsAnew(t *testing.T) {
	s := newStory(t).clients(1, 1)
	s.reading.Pod = "dagger/y"
	s.clients(0)
	s.want(Unknown, 1, "too few readings")
	if got := s.state().CacheBytes; got != 40<<30 {
		t.Errorf("%d bytes; want those of the node's disk", got)
	}
}

func TestForget(t *testing.T) {
	s := newStory(t).clients(0, 0, 0)
	s.tracker.Forget("n")
	s.want(Unknown, 0, "never read")
	s.reading.CacheBytes = 0 // of another instance
	for range 5 {
		if c := s.read(); c.Lost {
			t.Errorf("%+v; want nothing of the former instance", c)
		}
	}
	s.tracker.Forget("n")
	if len(s.tracker.engines) != 0 {
		t.Error("it is still remembered")
	}
}

func TestLostCache(t *testing.T) {
	const mib = 1 << 20
	for name, tt := range map[string]struct {
		bytes    []int64 // of one reading after another; -2: the reading fails
		lost     int     // which of them tells of a loss, from 0; -1: none
		before   int64
		after    int64
		verified bool // at the end
	}{
		"grows":                   {[]int64{0, 40 * mib, 400 * mib}, -1, 0, 400 * mib, true},
		"shrinks slowly":          {[]int64{400 * mib, 210 * mib, 110 * mib, 60 * mib}, -1, 0, 60 * mib, true},
		"half":                    {[]int64{400 * mib, 200 * mib, 200 * mib, 200 * mib}, -1, 0, 200 * mib, true},
		"wiped":                   {[]int64{400 * mib, 0, 0, 0, 0, 0}, 3, 400 * mib, 0, true},
		"mostly wiped":            {[]int64{400 * mib, 199 * mib, 10 * mib, 12 * mib, 12 * mib}, 3, 400 * mib, 12 * mib, true},
		"not yet sure":            {[]int64{400 * mib, 0, 0}, -1, 0, 400 * mib, false},
		"not counted yet":         {[]int64{400 * mib, 0, 0, 400 * mib, 0, 0, 410 * mib}, -1, 0, 410 * mib, true},
		"restarted and wiped":     {[]int64{400 * mib, -2, -2, 0, 0, 0}, 5, 400 * mib, 0, true},
		"failures decide nothing": {[]int64{400 * mib, 0, -2, -2, -2}, -1, 0, 400 * mib, false},
		"too little to matter":    {[]int64{16 * mib, 0, 0, 0}, -1, 0, 0, true},
		"just enough":             {[]int64{16*mib + 1, 0, 0, 0}, 3, 16*mib + 1, 0, true},
		"no longer said":          {[]int64{400 * mib, -1, -1, -1}, -1, 0, 400 * mib, false},
		"never said":              {[]int64{-1, -1}, -1, 0, -1, false},
		"told once":               {[]int64{400 * mib, 0, 0, 0, 20 * mib}, 3, 400 * mib, 20 * mib, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStory(t)
			for i, bytes := range tt.bytes {
				s.reading.CacheBytes, s.reading.Unknown = bytes, ""
				if bytes == -2 {
					s.reading.CacheBytes, s.reading.Unknown = -1, "no answer in time"
				}
				want := Change{}
				if i == tt.lost {
					want = Change{Lost: true, Before: tt.before, After: bytes}
				}
				if got := s.read(); got != want {
					t.Errorf("reading %d: %+v; want %+v", i, got, want)
				}
			}
			if got := s.state(); got.CacheBytes != tt.after || got.Verified != tt.verified {
				t.Errorf("%d bytes, verified %v; want %d, %v", got.CacheBytes, got.Verified, tt.after, tt.verified)
			}
		})
	}
}

// TestExpect: what a cache held before a stop, or before this process began, is
// believed only when it is seen again.
func TestExpect(t *testing.T) {
	s := newStory(t)
	s.tracker.Expect("n", 40<<30)
	if got := s.state(); got.Verified || got.CacheBytes != 40<<30 || got.Activity != Unknown || got.Reason != "never read" {
		t.Errorf("before the first reading: %+v", got)
	}
	s.reading.CacheBytes = 0 // not counted yet
	s.read()
	if got := s.state(); got.Verified || got.CacheBytes != 40<<30 {
		t.Errorf("not counted yet: %+v", got)
	}
	s.reading.CacheBytes = 39 << 30
	s.read()
	if got := s.state(); !got.Verified || got.CacheBytes != 39<<30 {
		t.Errorf("seen again: %+v", got)
	}

	s.tracker.Forget("n")
	s.tracker.Expect("n", 40<<30)
	s.reading.CacheBytes = 0
	s.read()
	s.read()
	if got, want := s.read(), (Change{Lost: true, Before: 40 << 30}); got != want {
		t.Errorf("gone: %+v; want %+v", got, want)
	}
}

func TestVersionChanges(t *testing.T) {
	s := newStory(t)
	for _, tt := range []struct{ version, old string }{
		{"v0.21.7", ""}, {"v0.21.7", ""}, {"", ""}, {"v0.21.8", "v0.21.7"}, {"v0.21.8", ""},
	} {
		s.reading.Version = tt.version
		if got := s.read(); got != (Change{OldVersion: tt.old}) {
			t.Errorf("version %q: %+v; want the old one to be %q", tt.version, got, tt.old)
		}
	}
}

// TestActivityByTheBook compares the tracker with one that keeps all readings and goes
// through them from the start whenever it is asked.
func TestActivityByTheBook(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tracker, now := NewTracker(), start
		var all []model.EngineReading
		for range rapid.IntRange(1, 40).Draw(t, "readings") {
			now = now.Add(rapid.SampledFrom([]time.Duration{0, time.Second, 30 * time.Second, staleAfter, staleAfter + 1}).Draw(t, "later"))
			r := model.EngineReading{Node: "n", At: now, Pod: rapid.SampledFrom([]string{"x", "x", "x", "y"}).Draw(t, "pod"), CacheBytes: -1}
			r.Clients = rapid.SampledFrom([]int{0, 0, 1}).Draw(t, "clients")
			if rapid.IntRange(0, 9).Draw(t, "fails") == 0 {
				r = model.EngineReading{Node: "n", At: now, CacheBytes: -1, Unknown: "why"}
			}
			tracker.Observe(r)
			if len(all) == 0 || r.At.After(all[len(all)-1].At) {
				all = append(all, r)
			}
			now = now.Add(rapid.SampledFrom([]time.Duration{0, 0, time.Minute}).Draw(t, "asked after"))
			if got, want := tracker.State("n", now).Activity, byTheBook(all, now); got != want {
				t.Fatalf("%v; want %v after %+v", got, want, all)
			}
		}
	})
}

func byTheBook(all []model.EngineReading, now time.Time) Activity {
	activity := Unknown
	var fresh time.Time // the newest that held
	pod := ""
	for i, r := range all {
		if i > 0 && r.At.Sub(all[i-1].At) > staleAfter || r.Unknown == "" && r.Pod != pod {
			activity = Unknown
		}
		if r.Unknown != "" {
			continue
		}
		fresh, pod = r.At, r.Pod
		// row says whether this and the n-1 readings before it are alike.
		row := func(n int, alike func(clients int) bool) bool {
			for j := i; j > i-n; j-- {
				if j < 0 || all[j].Unknown != "" || all[j].Pod != r.Pod || !alike(all[j].Clients) ||
					j < i && all[j+1].At.Sub(all[j].At) > staleAfter {
					return false
				}
			}
			return true
		}
		switch {
		case row(2, func(clients int) bool { return clients > 0 }):
			activity = Busy
		case row(3, func(clients int) bool { return clients == 0 }):
			activity = Idle
		}
	}
	if now.Sub(fresh) > staleAfter {
		return Unknown
	}
	return activity
}
