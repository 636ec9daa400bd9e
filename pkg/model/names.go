package model

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strings"
)

// GroupLabel returns the value of the label hearth.dev/node-group on the nodes
// of a group: its id when that is a valid label value, else a readable part of
// it and a hash.
func GroupLabel(id GroupID) string {
	if labelValue.MatchString(string(id)) && len(id) <= 63 {
		return string(id)
	}
	return HashedName(string(id), string(id))
}

// labelValue is the form of a Kubernetes label value that is not empty.
var labelValue = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$`)

// HashedName makes a name of at most 63 characters that is valid as the name of
// a Kubernetes object and as a label value: what it can of readable, and a hash
// of all.
func HashedName(readable, all string) string {
	sum := sha256.Sum256([]byte(all))
	safe := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9':
			return r
		case r >= 'A' && r <= 'Z':
			return r + ('a' - 'A')
		default:
			return '-'
		}
	}, readable)
	safe = strings.Trim(safe[:min(len(safe), 50)], "-")
	return strings.TrimPrefix(safe+"-"+hex.EncodeToString(sum[:5]), "-")
}
