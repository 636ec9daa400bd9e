package nodegroups

import (
	"testing"

	"pgregory.net/rapid"
)

// TestAnythingMayHappen drives a group through everything that can happen to
// it, in any order, and then lets the faults end.
func TestAnythingMayHappen(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := newSim(t)
		s.run(rapid.IntRange(1, 200).Draw(t, "steps"))
		s.converge()
	})
}
