package v1alpha1

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hearth-ci/hearth/pkg/model"
)

func TestNames(t *testing.T) {
	for _, tt := range []struct {
		name, got, want string
	}{
		{"a group's own id", GroupName("runners-a"), "runners-a"},
		{"a group's id with dots", GroupName("eks.runners"), "eks.runners"},
		{"an id that cannot be a name", GroupName("Team A/runners"), "team-a-runners-16e8db84c3"},
		{"a label may have capitals", GroupLabel("Team_A"), "Team_A"},
		{"an id that cannot be a label", GroupLabel("Team A/runners"), "team-a-runners-16e8db84c3"},
		{"an instance of AWS", NodeName("aws:///eu-central-1a/i-0abc"), "i-0abc-b77e5b607f"},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: got %q; want %q", tt.name, tt.got, tt.want)
		}
	}
}

func TestNamesAreValidAndDistinct(t *testing.T) {
	ids := []string{
		"", " ", "-", "a", "A", "a.b", "a_b", "a/b", "a b", "日本", "\xff", "i-1", "aws:///a/i-1", "aws:///b/i-1",
		strings.Repeat("x", 63), strings.Repeat("x", 64), strings.Repeat("x", 253), strings.Repeat("x", 500), strings.Repeat("é", 100) + "/",
	}
	for kind, name := range map[string]func(string) string{
		"GroupName":  func(id string) string { return GroupName(model.GroupID(id)) },
		"GroupLabel": func(id string) string { return GroupLabel(model.GroupID(id)) },
		"NodeName":   func(id string) string { return NodeName(model.InstanceID(id)) },
	} {
		seen := map[string]string{}
		for _, id := range ids {
			got := name(id)
			problems := validation.IsDNS1123Subdomain(got)
			if kind == "GroupLabel" {
				problems = validation.IsValidLabelValue(got)
			}
			if len(problems) > 0 || got == "" {
				t.Errorf("%s(%q) = %q: %v", kind, id, got, problems)
			}
			if other, taken := seen[got]; taken {
				t.Errorf("%s gives %q and %q the same name %q", kind, id, other, got)
			}
			seen[got] = id
		}
	}
}
