package main

import (
	"bytes"
	"encoding/json"
	"os"
	"runtime/debug"
	"slices"
	"testing"
)

// TestWrite: the bill of this test's own binary names the toolchain, and twice
// the same.
func TestWrite(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var once, again bytes.Buffer
	if err := write(&once, self); err != nil {
		t.Fatal(err)
	}
	if err := write(&again, self); err != nil || !bytes.Equal(once.Bytes(), again.Bytes()) {
		t.Errorf("another the second time: %v", err)
	}
	var b bom
	if err := json.Unmarshal(once.Bytes(), &b); err != nil || b.Format != "CycloneDX" {
		t.Fatalf("%v in %s", err, &once)
	}
	if !slices.ContainsFunc(b.Components, func(c component) bool { return c.Name == "std" && c.Version != "" }) {
		t.Errorf("no toolchain among %v", b.Components)
	}
	c := of("library", &debug.Module{Path: "example.com/a", Version: "v1.0.0+x", Sum: "h1:AAEC"})
	if c.PURL != "pkg:golang/example.com/a@v1.0.0+x" || len(c.Hashes) != 1 || c.Hashes[0].Content != "000102" {
		t.Errorf("%+v", c)
	}
	if write(&once, "main.go") == nil {
		t.Error("a text passes for a binary")
	}
}
