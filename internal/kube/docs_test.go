package kube

import (
	"os"
	"regexp"
	"testing"

	"github.com/hearth-ci/hearth/pkg/model"
)

// The labels in docs/placement.md are those of the keys beside them.
func TestLabelsInDocs(t *testing.T) {
	page, err := os.ReadFile("../../docs/placement.md")
	must(t, err)
	found := regexp.MustCompile(`(cache\.hearth\.dev/[0-9a-f]{16})\b[^#\n]*# (\S+)`).FindAllSubmatch(page, -1)
	if len(found) < 3 {
		t.Errorf("%d labels with their keys", len(found))
	}
	for _, m := range found {
		if want := WarmLabel(model.CacheKey(m[2])); string(m[1]) != want {
			t.Errorf("the label of %s is %s, not %s", m[2], want, m[1])
		}
	}
}
