package config

import (
	"bytes"
	"context"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long after the first event the file is read: a change is
	// often several events.
	settle = 100 * time.Millisecond
	// pollEvery finds changes that no event tells of, such as those of a file
	// behind a symbolic link, and tries a bad file again.
	pollEvery = 10 * time.Second
)

// Watch follows the file at path until ctx ends, and always returns nil then.
// current is the Config that was loaded from it last. Whenever the file has
// other content, or after a failure, it is loaded, checked against current
// (Replaceable) and handed to apply; if any of that fails, the Config before
// stays. reloaded is told every outcome once: nil after success, also when the
// file is back to what is in use. Both functions are called from one
// goroutine, the caller's.
//
// Kubernetes replaces a mounted ConfigMap by renaming a symbolic link beside
// the file; therefore the folder is watched. Where the system has no more
// watches to give, polling alone does it.
func Watch(ctx context.Context, path string, current *Config, apply func(*Config) error, reloaded func(error)) error {
	return watch(ctx, pollEvery, reloader{path: path, current: current, apply: apply, reloaded: reloaded})
}

func watch(ctx context.Context, every time.Duration, r reloader) error {
	var events chan fsnotify.Event
	var lost chan error
	if w, err := fsnotify.NewWatcher(); err == nil {
		defer w.Close()
		if w.Add(filepath.Dir(r.path)) == nil {
			events, lost = w.Events, w.Errors
		}
	}
	poll := time.NewTicker(every)
	defer poll.Stop()
	r.look() // the file may have changed since current was loaded
	var settled <-chan time.Time
	changed := func() {
		if settled == nil {
			settled = time.After(settle)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-events:
			changed()
		case <-lost: //nolint:errcheck // some events were; which does not matter
			changed()
		case <-settled:
			settled = nil
			r.look()
		case <-poll.C:
			r.look()
		}
	}
}

// reloader holds what Watch knows between two looks at the file.
type reloader struct {
	path     string
	current  *Config
	apply    func(*Config) error
	reloaded func(error)

	failure string // of the last look, empty after success
}

// look brings the file into use if it differs from what is.
func (r *reloader) look() {
	changed, err := r.try()
	switch {
	case err != nil && err.Error() != r.failure:
		r.failure = err.Error()
		r.reloaded(err)
	case err == nil && (changed || r.failure != ""):
		r.failure = ""
		r.reloaded(nil)
	}
}

func (r *reloader) try() (changed bool, err error) {
	data, err := read(r.path)
	if err != nil || bytes.Equal(data, r.current.source) {
		return false, err
	}
	next, err := load(data, r.path)
	if err != nil {
		return false, err
	}
	if err := r.current.Replaceable(next, r.path); err != nil {
		return false, err
	}
	if err := r.apply(next); err != nil {
		return false, err
	}
	r.current = next
	return true, nil
}
