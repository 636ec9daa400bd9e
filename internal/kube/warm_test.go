package kube

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hearth-ci/hearth/pkg/model"
)

// oddKeys are what whoever creates pods may call a pipeline.
func oddKeys() map[string]model.CacheKey {
	long := CacheKey(nil, map[string]string{"hearth.dev/cache-key": strings.Repeat("/ü<&>", 2500)}, nil)
	return map[string]model.CacheKey{
		"plain": "dagger/dagger", "a space": " ", "control characters": "a\x00\n\t\x7f", "quotes": `"'{}[]\`,
		"markup": "<b>&amp;</b>", "emoji": "🔥/👩‍👩‍👧", "as long as the bound": model.CacheKey(strings.Repeat("k", maxKeyLength)),
		"10 kB, cut": long, "like a label": "cache.hearth.dev/0123456789abcdef", "right to left": "\u202eabc",
	}
}

// Any key makes a valid label, and comes back from the Node that bears it.
func TestWarmLabelsOfAnyKey(t *testing.T) {
	n := &corev1.Node{}
	var all model.WarmKeys
	copy(all[:], slices.Sorted(maps.Values(oddKeys())))
	markWarm(n, all)
	for name, key := range oddKeys() {
		label := WarmLabel(key)
		if problems := validation.IsQualifiedName(label); len(problems) > 0 {
			t.Errorf("%s: label %q: %v", name, label, problems)
		}
		if n.Labels[label] != "warm" {
			t.Errorf("%s: the node has no label %q", name, label)
		}
	}
	if len(WarmLabels(n.Labels)) != len(oddKeys()) {
		t.Errorf("%d labels for %d keys", len(n.Labels), len(oddKeys()))
	}
	var want model.WarmKeys
	copy(want[:], slices.Sorted(maps.Values(oddKeys())))
	if diff := cmp.Diff(want, warmKeys(n)); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
	markWarm(n, model.WarmKeys{})
	if len(n.Labels) > 0 || len(n.Annotations) > 0 {
		t.Errorf("a cold node keeps labels %v and annotations %v", n.Labels, n.Annotations)
	}
}

func TestWarmAnnotationIsReadable(t *testing.T) {
	n := &corev1.Node{}
	markWarm(n, model.WarmKeys{"<b>&", "dagger/dagger"})
	// printf %s dagger/dagger | sha256sum | cut -c1-16
	want := `{"90db8b73387fa482":"dagger/dagger","b5400d3cfdf11cc1":"<b>&"}`
	if got := n.Annotations["hearth.dev/warm-keys"]; got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

// The largest set of the longest keys stays far below what an object may hold.
func TestWarmAnnotationIsBounded(t *testing.T) {
	n := &corev1.Node{}
	var keys model.WarmKeys
	for i := range keys {
		keys[i] = model.CacheKey(fmt.Sprintf("%03d", i) + strings.Repeat("\x01", maxKeyLength-3))
	}
	markWarm(n, keys)
	if size := len(n.Annotations["hearth.dev/warm-keys"]); size > 40<<10 {
		t.Errorf("an annotation of %d bytes", size)
	}
	if got := warmKeys(n); got != keys {
		t.Errorf("read back %q", got)
	}
}

// What somebody else made of the labels is not what we want, so that it is put
// right; and it never calls a node warm for a key.
func TestSpoiltWarmLabels(t *testing.T) {
	keys := model.WarmKeys{"a", "b"}
	for name, spoil := range map[string]func(*corev1.Node){
		"label gone":            func(n *corev1.Node) { delete(n.Labels, WarmLabel("a")) },
		"all labels gone":       func(n *corev1.Node) { n.Labels = nil },
		"another value":         func(n *corev1.Node) { n.Labels[WarmLabel("a")] = "cold" },
		"a label more":          func(n *corev1.Node) { n.Labels[WarmLabel("c")] = warm },
		"annotation gone":       func(n *corev1.Node) { n.Annotations = nil },
		"annotation unreadable": func(n *corev1.Node) { n.Annotations[annotationWarmKeys] = "{" },
		"annotation of another type": func(n *corev1.Node) {
			n.Annotations[annotationWarmKeys] = `["a","b"]`
		},
		"annotation lies": func(n *corev1.Node) {
			n.Annotations[annotationWarmKeys] = fmt.Sprintf(`{%q:"a",%q:"x"}`, warmHash("a"), warmHash("b"))
		},
		"more labels than can be": func(n *corev1.Node) {
			for i := range 30 {
				n.Labels[fmt.Sprintf("cache.hearth.dev/%d", i)] = warm
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := &corev1.Node{}
			markWarm(n, keys)
			spoil(n)
			if got := warmKeys(n); got == keys {
				t.Error("nobody notices")
			} else if slices.Contains(got[:], "x") {
				t.Errorf("it is warm for %q", got)
			}
			markWarm(n, keys)
			if got := warmKeys(n); got != keys {
				t.Errorf("put right it is warm for %q", got)
			}
		})
	}
}

func FuzzWarmKeys(f *testing.F) {
	f.Add("a", "b", "{}")
	f.Fuzz(func(t *testing.T, a, b, annotation string) {
		n := &corev1.Node{}
		one, two := bounded(a), bounded(b)
		var keys model.WarmKeys
		found := slices.Compact(slices.Sorted(slices.Values(slices.DeleteFunc([]model.CacheKey{one, two}, func(k model.CacheKey) bool { return k == "" }))))
		copy(keys[:], found)
		markWarm(n, keys)
		if got := warmKeys(n); got != keys {
			t.Errorf("%q came back as %q", keys, got)
		}
		if n.Annotations == nil {
			n.Annotations = map[string]string{}
		}
		n.Annotations[annotationWarmKeys] = annotation
		_ = warmKeys(n)
	})
}
