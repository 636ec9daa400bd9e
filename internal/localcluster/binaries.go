package localcluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// BinEnv names the environment variable that says where the binaries are.
const BinEnv = "HEARTH_CLUSTER_BIN"

// ErrNoBinaries is wrapped by the error of FindBinaries: the control plane is not built yet.
var ErrNoBinaries = errors.New("the control plane is not built: run `make cluster`")

const (
	etcd              = "etcd"
	apiServer         = "kube-apiserver"
	controllerManager = "kube-controller-manager"
	scheduler         = "kube-scheduler"
	kwok              = "kwok"
)

// FindBinaries returns the folder that holds the control plane's binaries: $HEARTH_CLUSTER_BIN
// if set, else .cache/cluster beside the nearest go.mod, of the working directory or a parent,
// that has it. The error wraps ErrNoBinaries when there is none, or one binary is missing.
func FindBinaries() (string, error) {
	if dir := os.Getenv(BinEnv); dir != "" {
		return dir, checkBinaries(dir)
	}
	wd, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the control plane: %w", err)
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		bin := filepath.Join(dir, ".cache", "cluster")
		if exists(filepath.Join(dir, "go.mod")) && exists(bin) {
			return bin, checkBinaries(bin)
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("no .cache/cluster in %s or above: %w", wd, ErrNoBinaries)
		}
	}
}

func checkBinaries(dir string) error {
	for _, name := range []string{etcd, apiServer, controllerManager, scheduler, kwok} {
		if !exists(filepath.Join(dir, name)) {
			return fmt.Errorf("no %s in %s: %w", name, dir, ErrNoBinaries)
		}
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
