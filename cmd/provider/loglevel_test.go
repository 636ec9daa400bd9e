package main

import (
	"log/slog"
	"testing"
)

func TestLogLevelFollowsTheFile(t *testing.T) {
	l, err := newLogLevel("warn", "")
	if err != nil || l.Level() != slog.LevelWarn {
		t.Fatalf("%v, %v", l, err)
	}
	for _, tc := range []struct {
		file string
		want slog.Level
	}{{"debug", slog.LevelDebug}, {"error", slog.LevelError}, {"", slog.LevelWarn}} {
		if err := l.set(tc.file); err != nil || l.Level() != tc.want {
			t.Errorf("file %q: %v, %v", tc.file, l.Level(), err)
		}
	}
	if err := l.set("loud"); err == nil || l.Level() != slog.LevelWarn {
		t.Errorf("a bad level: %v, %v", l.Level(), err)
	}
	if _, err := newLogLevel("loud", ""); err == nil {
		t.Error("a bad flag was taken")
	}
}
