package simulate_test

import (
	"math/rand/v2"
	"testing"

	"github.com/hearth-ci/hearth/pkg/simulate"
)

func TestOurNames(t *testing.T) {
	for _, name := range []string{"hearth", "hearth@20", "hearth@36.5", "hearth-no-prewarm", "hearth-no-prewarm@45"} {
		p, err := simulate.FindPolicy(name)
		if err != nil || p.Name != name || !simulate.Ours(name) {
			t.Errorf("%s: found %q, ours %v, error %v", name, p.Name, simulate.Ours(name), err)
		}
	}
	for _, name := range []string{"hearth@", "hearth@0", "hearth@x", "hearth-no-prewarm@-1", "hearth-no", "ca-default@20", ""} {
		if p, err := simulate.FindPolicy(name); err == nil {
			t.Errorf("%q: found %q", name, p.Name)
		}
	}
	if simulate.Ours("hearthstone") || simulate.Ours("ca-default") {
		t.Error("others' policies are taken for ours")
	}
}

// TestNoPrewarm: without starts ahead of demand, every resume is for a job that
// waits for it or gets another slot in the meantime. With them there are more.
func TestNoPrewarm(t *testing.T) {
	g := simulate.DefaultGenerated()
	g.Jobs, g.Weeks = 5000, 4
	trace, err := simulate.Generate(g, rand.New(rand.NewPCG(1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	unasked := func(name string) int {
		p, err := simulate.FindPolicy(name)
		if err != nil {
			t.Fatal(err)
		}
		ahead := 0
		watch := func(_ int64, n *simulate.Node) {
			if n.State == simulate.Resuming {
				ahead++
			}
		}
		r, err := simulate.Run(trace, simulate.DefaultWorld(), p, simulate.Options{Watch: watch})
		if err != nil {
			t.Fatal(err)
		}
		return ahead - r.AfterResume - r.AfterJob
	}
	with, without := unasked("hearth@60"), unasked("hearth-no-prewarm@60")
	if without > 0 || with <= without {
		t.Errorf("%d resumes that no job waited for, %d without starts ahead: want some and none", with, without)
	}
}
