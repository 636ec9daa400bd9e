package server

import (
	"context"
	"slices"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// register registers a service whose malformed requests (not protobuf, or
// invalid UTF-8 in a text) are the caller's fault, InvalidArgument. gRPC itself
// answers Internal as soon as a codec fails; so the codec does not fail, but
// leaves its error in the request.
func register(server *grpc.Server, desc grpc.ServiceDesc, implementation any) {
	desc.Methods = slices.Clone(desc.Methods)
	for i, method := range desc.Methods {
		desc.Methods[i].Handler = func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			return method.Handler(srv, ctx, func(message any) error {
				r := request{message: message}
				if err := decode(&r); err != nil {
					return err
				}
				if r.malformed != nil {
					return status.Errorf(codes.InvalidArgument, "malformed request: %v", r.malformed)
				}
				return nil
			}, interceptor)
		}
	}
	server.RegisterService(&desc, implementation)
}

// request is a request's message with what was wrong with its bytes.
type request struct {
	message   any
	malformed error
}

// codec is the protobuf codec, but for the errors of a *request.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if r, ok := v.(*request); ok {
		r.malformed = c.CodecV2.Unmarshal(data, r.message)
		return nil
	}
	return c.CodecV2.Unmarshal(data, v)
}
