package placement

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
)

// Files is a certificate in PEM files that somebody else renews. Each handshake
// reads them: they are small, connections are few and long. Files that cannot
// be used are reported once, and the last good ones stay in use. Its methods
// are safe for concurrent use.
type Files struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex
	read    [2][]byte // what is in use
	pair    *tls.Certificate
	failure string // of the last reading, empty after success
}

// NewFiles fails when the files cannot be used.
func NewFiles(cert, key string, log *slog.Logger) (*Files, error) {
	f := &Files{cert: cert, key: key, log: log}
	return f, f.load()
}

func (f *Files) load() error {
	var content [2][]byte
	for i, file := range []string{f.cert, f.key} {
		var err error
		if content[i], err = os.ReadFile(file); err != nil {
			return fmt.Errorf("reading the placement certificate: %w", err)
		}
	}
	if f.pair != nil && bytes.Equal(content[0], f.read[0]) && bytes.Equal(content[1], f.read[1]) {
		return nil
	}
	pair, err := tls.X509KeyPair(content[0], content[1])
	if err != nil {
		return fmt.Errorf("placement certificate %q with key %q: %w", f.cert, f.key, err)
	}
	f.read, f.pair = content, &pair
	return nil
}

// Certificate returns what is to be used now.
func (f *Files) Certificate() (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch err := f.load(); {
	case err == nil:
		f.failure = ""
	case err.Error() != f.failure:
		f.failure = err.Error()
		f.log.Error("the placement certificate cannot be used; the one before stays in use", "err", err)
	}
	return f.pair, nil
}
