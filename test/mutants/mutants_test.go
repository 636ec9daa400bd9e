package main

import "testing"

// TestMutantsApply: every defect can still be made; how many are noticed is for
// `make mutants`, which takes minutes.
func TestMutantsApply(t *testing.T) {
	t.Chdir("../..")
	names := map[string]bool{}
	for _, m := range mutants() {
		if _, err := m.changed(); err != nil {
			t.Errorf("%s: %v", m.Name, err)
		}
		if names[m.Name] || len(m.Tests) == 0 {
			t.Errorf("%s: want a name of its own, and tests", m.Name)
		}
		names[m.Name] = true
	}
	if len(names) < 20 {
		t.Errorf("%d defects, want 20", len(names))
	}
}
