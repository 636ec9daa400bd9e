package main

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestCheckPage: docs/check.md lists what is really said. Tests beside each source
// make the mistake and look for the words.
func TestCheckPage(t *testing.T) {
	page, err := os.ReadFile("../../docs/check.md")
	if err != nil {
		t.Fatal(err)
	}
	var sources strings.Builder
	for _, path := range []string{
		"check.go", "certificate.go", "../../internal/kube/doctor.go", "../../internal/aws/check.go", "../../internal/aws/price.go",
		"../../internal/config/config.go", "../../internal/config/schema.go", "../../internal/config/decode.go",
	} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		sources.Write(text)
	}
	rows := regexp.MustCompile("(?m)^\\| [^|]+ \\| .+ \\| `([^`]+)` \\|$").FindAllStringSubmatch(string(page), -1)
	if len(rows) < 15 {
		t.Fatalf("%d rows", len(rows))
	}
	for _, row := range rows {
		if !strings.Contains(sources.String(), row[1]) {
			t.Errorf("nothing says %q", row[1])
		}
	}
}
