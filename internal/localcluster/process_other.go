//go:build unix && !linux

package localcluster

import "syscall"

// childAttr puts a child into a process group of its own, so that a Ctrl-C at the terminal
// reaches only us. Without Linux's parent-death signal a SIGKILL of us leaves children behind.
func childAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
