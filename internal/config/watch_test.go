package config

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const small = `apiVersion: hearth.dev/v1alpha1
kind: ProviderConfig
backend: {kwok: {}}
nodeGroups:
- {id: a, max: 1, template: {capacity: {cpu: 1, memory: 1Gi, pods: 10}}}
`

// TestPollingFindsWhatNoEventTells changes a file that is linked from another
// folder than the one which is watched.
func TestPollingFindsWhatNoEventTells(t *testing.T) {
	target, path := filepath.Join(t.TempDir(), "target.yaml"), filepath.Join(t.TempDir(), "hearth.yaml")
	put(t, target, small)
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
	current, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	put(t, target, strings.ReplaceAll(small, "max: 1", "max: 2"))
	applied := 0
	err = watch(ctx, 10*time.Millisecond, reloader{path: path, current: current, reloaded: func(error) {}, apply: func(c *Config) error {
		switch applied++; applied {
		case 1: // changed before the watch began
			put(t, target, strings.ReplaceAll(small, "max: 1", "max: 3"))
		case 2:
			if c.NodeGroups()[0].Max != 3 {
				t.Errorf("got max %d, want 3", c.NodeGroups()[0].Max)
			}
			cancel()
		}
		return nil
	}})
	if err != nil || applied != 2 {
		t.Errorf("applied %d times, %v", applied, err)
	}
}

// TestFailuresAreTriedAgainAndToldOnce: a file can become good without being
// changed itself, and nobody wants to read the same error every ten seconds.
func TestFailuresAreTriedAgainAndToldOnce(t *testing.T) {
	dir := t.TempDir()
	path, kubeconfig := filepath.Join(dir, "hearth.yaml"), filepath.Join(dir, "kubeconfig")
	text := small + "kubernetes: {kubeconfig: " + kubeconfig + "}\n"
	put(t, path, text)
	put(t, kubeconfig, "any")
	current, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	var told []error
	r := reloader{path: path, current: current, apply: func(*Config) error { return nil }, reloaded: func(err error) { told = append(told, err) }}

	r.look()
	if len(told) != 0 {
		t.Fatalf("nothing happened, and yet: %v", told)
	}
	put(t, path, strings.ReplaceAll(text, "max: 1", "max: 2"))
	if err := os.Remove(kubeconfig); err != nil {
		t.Fatal(err)
	}
	r.look()
	r.look()
	if len(told) != 1 || told[0] == nil || r.current != current {
		t.Fatalf("want one failure and the old config, got %v", told)
	}
	put(t, kubeconfig, "any")
	r.look()
	r.look()
	if len(told) != 2 || told[1] != nil || r.current.NodeGroups()[0].Max != 2 {
		t.Fatalf("want a success and the new config, got %v", told)
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
