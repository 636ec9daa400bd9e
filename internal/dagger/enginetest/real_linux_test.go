package enginetest

import (
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hearth-ci/hearth/internal/dagger"
)

// TestRealEngine does with a real engine what the stand-in stands for: a stop with no
// client exits 0 and keeps the data, a kill erases them at the next start. It runs when
// DAGGER_ENGINE is the path of a dagger-engine binary, and is for a machine that may be
// thrown away: a real engine needs root, dnsmasq, /usr/local/bin/runc, iptables (whose
// links in /usr/bin it sets), and always listens at /run/dagger/engine.sock.
func TestRealEngine(t *testing.T) {
	binary := os.Getenv("DAGGER_ENGINE")
	if binary == "" {
		t.Skip("DAGGER_ENGINE is not set: no real engine to test")
	}
	if os.Geteuid() != 0 {
		t.Skip("DAGGER_ENGINE is set, but a real engine needs root")
	}
	dir := t.TempDir()

	// life runs the engine until end has ended it, and returns what it logged.
	life := func(code int, end func(*Engine)) string {
		t.Helper()
		e := startReal(t, binary, dir)
		begun := time.Now()
		end(e)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		got, err := e.Wait(ctx)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("ended in %v", time.Since(begun))
		if got != code {
			t.Fatalf("exit code %d; want %d:\n%s", got, code, e.stderr.String())
		}
		return e.stderr.String()
	}
	const wiped = "marked unclean; wiping"
	if strings.Contains(life(0, (*Engine).Stop), wiped) {
		t.Error("the first start found something to wipe")
	}
	if strings.Contains(life(0, (*Engine).Stop), wiped) {
		t.Error("a clean stop was taken for an unclean one")
	}
	if strings.Contains(life(137, (*Engine).Kill), wiped) {
		t.Error("a clean stop was taken for an unclean one")
	}
	if !strings.Contains(life(0, (*Engine).Stop), wiped) {
		t.Error("a kill was taken for a clean stop")
	}
}

// startReal returns once the engine serves metrics that Hearth can read. The engine
// has a mount namespace of its own, because it mounts over /etc/resolv.conf.
func startReal(t *testing.T, binary, dir string) *Engine {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := free.Addr().String()
	free.Close()
	config := filepath.Join(dir, "engine.toml")
	if err := os.WriteFile(config, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), binary, "--config", config, "--root", filepath.Join(dir, "root"),
		"--network-name", "hearthtest", "--network-cidr", "10.231.0.0/16")
	cmd.Env = append(os.Environ(), "_EXPERIMENTAL_DAGGER_METRICS_ADDR="+addr, "_EXPERIMENTAL_DAGGER_METRICS_CACHE_UPDATE_INTERVAL=1s")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	cmd.WaitDelay = 5 * time.Second // its children may keep its standard error open
	e, err := start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	go e.reap()
	t.Cleanup(e.Kill)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		err := readReal(t.Context(), "http://"+addr+"/metrics")
		if err == nil {
			return e
		}
		select {
		case <-e.ended:
			t.Fatalf("it exited with %d:\n%s", e.code, e.stderr.String())
		default:
		}
		if time.Now().After(deadline) {
			e.Kill()
			t.Fatalf("no metrics after a minute: %v:\n%s", err, e.stderr.String())
		}
	}
}

func readReal(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _, err = dagger.Parse(resp.Body)
	return err
}
