package nodegroups

import (
	"errors"
	"fmt"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Kind classifies why an event was refused. The server maps kinds to gRPC
// codes in one function; nothing else looks at the text.
type Kind string

// Kinds of refusal. Whatever the kind, a refused event changed nothing.
const (
	// KindNotFound: the group or instance is not known.
	KindNotFound Kind = "not-found"
	// KindInvalid: the request can never succeed as it stands.
	KindInvalid Kind = "invalid"
	// KindVetoed: the node is busy or the plan has not released it; the same
	// request may succeed later.
	KindVetoed Kind = "vetoed"
	// KindOutOfRange: the group's minimum or maximum is in the way.
	KindOutOfRange Kind = "out-of-range"
	// KindUnavailable: not synced, not leading, or the record could not be
	// written in time; ask again.
	KindUnavailable Kind = "unavailable"
)

// Error is a refusal.
type Error struct {
	Kind   Kind
	Group  model.GroupID
	Reason string // a stable word for metrics: busy, not-released, …
	Text   string
}

func (e *Error) Error() string {
	if e.Group == "" {
		return e.Text
	}
	return fmt.Sprintf("node group %q: %s", string(e.Group), e.Text)
}

// KindOf returns the kind of the first Error in err's chain, or "" when there
// is none.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return ""
}

// Refuse builds a refusal.
func Refuse(kind Kind, group model.GroupID, reason, format string, args ...any) *Error {
	return &Error{Kind: kind, Group: group, Reason: reason, Text: fmt.Sprintf(format, args...)}
}
