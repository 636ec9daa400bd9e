package server

import (
	"context"
	"errors"
	"log/slog"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hearth-ci/hearth/pkg/nodegroups"
)

// errUnimplemented is the answer to optional requests that have none: CA does
// without.
var errUnimplemented = errors.New("not provided for this node group")

// codeOf is the one place where errors become gRPC codes. CA knows Unimplemented
// (do without) from all others (an error in its loop), people and metrics know
// the rest.
func codeOf(err error) codes.Code {
	if s, ok := status.FromError(err); ok {
		return s.Code() // of gRPC itself or of the recovery
	}
	switch nodegroups.KindOf(err) {
	case nodegroups.KindNotFound:
		return codes.NotFound
	case nodegroups.KindInvalid:
		return codes.InvalidArgument
	case nodegroups.KindVetoed:
		return codes.FailedPrecondition
	case nodegroups.KindOutOfRange:
		return codes.OutOfRange
	case nodegroups.KindUnavailable:
		return codes.Unavailable
	}
	switch {
	case errors.Is(err, errUnimplemented):
		return codes.Unimplemented
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return codes.Internal
}

// toStatus makes err fit for the wire. What is not meant for the other side is
// logged instead.
func toStatus(err error, method string, log *slog.Logger) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	code := codeOf(err)
	if code == codes.Internal {
		log.Error("request failed", "method", method, "err", err)
		return status.Error(code, "internal error; the provider's log says more")
	}
	return status.Error(code, err.Error())
}
