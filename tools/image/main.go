// Command image writes the container image of Hearth as an OCI archive, from
// nothing: the static binary, the certificates of public authorities and a user
// that is not root. It needs no container engine and no base image, and writes
// the same bytes for the same input.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	out := flag.String("out", "", "the archive to write")
	version := flag.String("version", "unknown", "what `hearth version` says")
	platforms := flag.String("platforms", "linux/amd64,linux/arm64", "what to build for")
	authorities := flag.String("authorities", "/etc/ssl/certs/ca-certificates.crt", "a PEM file of the authorities to trust")
	flag.Parse()
	if err := build(*out, *version, strings.Split(*platforms, ","), *authorities); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func build(out, version string, platforms []string, authorities string) error {
	if out == "" {
		return errors.New("-out: want the path of the archive to write")
	}
	trusted, err := os.ReadFile(authorities)
	if err != nil {
		return fmt.Errorf("-authorities: %w", err)
	}
	dir, err := os.MkdirTemp("", "hearth-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, platform := range platforms {
		system, architecture, ok := strings.Cut(platform, "/")
		if !ok {
			return fmt.Errorf("-platforms: want such as linux/amd64, got %q", platform)
		}
		binary := filepath.Join(dir, architecture)
		build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version="+version, "-o", binary, "./cmd/provider")
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+system, "GOARCH="+architecture)
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("building for %s: %w", platform, err)
		}
		text, err := os.ReadFile(binary)
		if err != nil {
			return err
		}
		image, err := imageOf(text, trusted, version, system, architecture)
		if err != nil {
			return fmt.Errorf("the image for %s: %w", platform, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{
			Platform: &v1.Platform{OS: system, Architecture: architecture},
		}})
	}
	root := filepath.Join(dir, "layout")
	if _, err := layout.Write(root, index); err != nil {
		return fmt.Errorf("writing the layout: %w", err)
	}
	return archive(root, out)
}

// user is nobody's, as in other images without a shell.
const user = 65532

func imageOf(binary, trusted []byte, version, system, architecture string) (v1.Image, error) {
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range []struct {
			name string
			mode int64
			text []byte
		}{
			{"etc/", 0o755, nil},
			{"etc/passwd", 0o644, fmt.Appendf(nil, "hearth:x:%d:%d::/:/nonexistent\n", user, user)},
			{"etc/ssl/", 0o755, nil},
			{"etc/ssl/certs/", 0o755, nil},
			{"etc/ssl/certs/ca-certificates.crt", 0o644, trusted},
			{"hearth", 0o755, binary},
			{"tmp/", 0o1777, nil},
		} {
			h := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.text)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}
			if strings.HasSuffix(f.name, "/") {
				h.Typeflag = tar.TypeDir
			}
			if err := w.WriteHeader(h); err != nil {
				return nil, err
			}
			if _, err := w.Write(f.text); err != nil {
				return nil, err
			}
		}
		return io.NopCloser(&b), w.Close()
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if image, err = mutate.AppendLayers(image, layer); err != nil {
		return nil, err
	}
	return mutate.ConfigFile(image, config(image, version, system, architecture))
}

func config(image v1.Image, version, system, architecture string) *v1.ConfigFile {
	file, err := image.ConfigFile()
	if err != nil { // cannot be: it was made here
		panic(err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = system, architecture
	file.Config = v1.Config{
		User: fmt.Sprintf("%d:%d", user, user), Entrypoint: []string{"/hearth"}, Env: []string{"PATH=/"},
		Labels: map[string]string{
			"org.opencontainers.image.title": "hearth", "org.opencontainers.image.version": version, "org.opencontainers.image.licenses": "Apache-2.0",
		},
	}
	return file
}

// archive writes a folder as a tar file whose bytes depend on nothing else.
func archive(root, out string) error {
	var names []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			names = append(names, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	file, err := os.Create(out)
	if err != nil {
		return err
	}
	defer file.Close()
	w := tar.NewWriter(file)
	for _, path := range names {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: filepath.ToSlash(name), Mode: 0o644, Size: int64(len(text)), ModTime: time.Unix(0, 0), Typeflag: tar.TypeReg}); err != nil {
			return err
		}
		if _, err := w.Write(text); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return file.Close()
}
