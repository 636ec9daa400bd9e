package ci

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Secret returns what both sides know. It is called for every message.
type Secret func() []byte

// lookAgain is how often a secret's file is read: mounted Secrets change under a
// running process.
const lookAgain = 10 * time.Second

// SecretFile returns the content of a file, without white space around it, and
// follows its changes. An error means that there is nothing to begin with; later
// the last that was read stays.
func SecretFile(path string, now func() time.Time, log *slog.Logger) (Secret, error) {
	read := func() ([]byte, error) {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		if text = bytes.TrimSpace(text); len(text) == 0 {
			return nil, fmt.Errorf("%s is empty", path)
		}
		return text, nil
	}
	value, err := read()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	looked := now()
	return func() []byte {
		mu.Lock()
		defer mu.Unlock()
		if now().Sub(looked) < lookAgain {
			return value
		}
		looked = now()
		next, err := read()
		switch {
		case err != nil && !errors.Is(err, os.ErrNotExist):
			log.Warn("a secret cannot be read; the one before stays", "err", err)
		case err == nil:
			value = next
		}
		return value
	}, nil
}

// sameText compares in a time that says nothing about either text.
func sameText(given string, secret []byte) bool {
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256(secret)
	return given != "" && subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// signed says whether a MAC is that of the parts, one after the other.
func signed(mac, secret []byte, parts ...[]byte) bool {
	h := hmac.New(sha256.New, secret)
	for _, p := range parts {
		h.Write(p)
	}
	return hmac.Equal(mac, h.Sum(nil))
}
