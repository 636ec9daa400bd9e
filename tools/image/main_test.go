package main

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// TestImage: the same input gives the same bytes; the image is valid, runs as a
// user that is not root, and holds what it should.
func TestImage(t *testing.T) {
	dir := t.TempDir()
	write := func(name string) []byte {
		t.Helper()
		image, err := imageOf([]byte("binary"), []byte("authorities"), "v1", "linux", "arm64")
		if err != nil {
			t.Fatal(err)
		}
		file, err := image.ConfigFile()
		if err != nil || file.Config.User != "65532:65532" || file.Architecture != "arm64" || file.Config.Entrypoint[0] != "/hearth" {
			t.Errorf("config %+v, %v", file, err)
		}
		found := map[string]int64{}
		r := tar.NewReader(mutate.Extract(image))
		for {
			h, err := r.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			found[h.Name] = h.Mode
		}
		if found["hearth"] != 0o755 || found["etc/ssl/certs/ca-certificates.crt"] != 0o644 || found["tmp"] != 0o1777 {
			t.Errorf("it holds %v", found)
		}
		root := filepath.Join(dir, name)
		if _, err := layout.Write(root, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}})); err != nil {
			t.Fatal(err)
		}
		index, err := layout.ImageIndexFromPath(root)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Index(index); err != nil {
			t.Error(err)
		}
		if err := archive(root, root+".tar"); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(root + ".tar")
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	if !bytes.Equal(write("a"), write("b")) {
		t.Error("two archives of the same input differ")
	}
}

func TestMistakes(t *testing.T) {
	if err := build("", "v", nil, "/dev/null"); err == nil {
		t.Error("no path was taken")
	}
	if err := build(filepath.Join(t.TempDir(), "x"), "v", []string{"linux"}, "/dev/null"); err == nil {
		t.Error("a platform without an architecture was taken")
	}
	if err := build(filepath.Join(t.TempDir(), "x"), "v", nil, filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("authorities that are not there were taken")
	}
}
