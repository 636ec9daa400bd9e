package main

import (
	"log/slog"

	"github.com/hearth-ci/hearth/internal/telemetry"
)

// logLevel is what is logged now: log.level of the config file, or the flag's
// when the file does not say. It changes with the file and in no other way, so
// that whoever may change it is whoever may change the file.
type logLevel struct {
	slog.LevelVar
	flag slog.Level
}

func newLogLevel(flag, file string) (*logLevel, error) {
	level, err := telemetry.ParseLevel(flag)
	if err != nil {
		return nil, err
	}
	l := &logLevel{flag: level}
	return l, l.set(file)
}

// set takes the config file's level, empty when it has none.
func (l *logLevel) set(file string) error {
	level := l.flag
	if file != "" {
		var err error
		if level, err = telemetry.ParseLevel(file); err != nil {
			return err
		}
	}
	l.Set(level)
	return nil
}
