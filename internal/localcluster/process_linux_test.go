package localcluster

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// holdEnv makes the test binary start a process, print its pid, and wait to be killed.
const holdEnv = "LOCALCLUSTER_TEST_HOLD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holdEnv); dir != "" {
		p, err := newSpawner().start("sleep", "/bin/sleep", dir, nil, []string{"600"})
		if err != nil {
			panic(err)
		}
		fmt.Println(p.cmd.Process.Pid)
		select {}
	}
	goleak.VerifyTestMain(m)
}

func TestProcessesDieWithUs(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	parent := exec.Command(self)
	parent.Env = append(os.Environ(), holdEnv+"="+t.TempDir())
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	pid, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := gone(pid); err == nil {
		t.Fatal("the child does not run, so this shows nothing")
	}
	if err := parent.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = parent.Wait() // reports the kill
	eventually(t, 5*time.Second, func() error { return gone(pid) })
}

// gone returns an error if the process runs. One that is dead but not reaped does not run.
func gone(pid string) error {
	pid = strings.TrimSpace(pid)
	stat, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
	if err != nil {
		return nil
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	if strings.HasPrefix(state, "Z") {
		return nil
	}
	return fmt.Errorf("process %s is alive: %s", pid, stat)
}
