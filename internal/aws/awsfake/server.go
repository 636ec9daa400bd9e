package awsfake

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Call is one request as the server got it.
type Call struct {
	Operation string // such as SetDesiredCapacity
	Group     string // when it names one
	Instances []string
	Form      url.Values
	N         int // how often this operation was called, from 1
}

// Fault is how a call goes wrong.
type Fault int

// Faults. Those that end in "After" let the call take effect.
const (
	None         Fault = iota
	Throttle           // refused: Throttling
	ServerError        // 503 before it takes effect
	ErrorAfter         // 500 after it took effect
	HangBefore         // no answer until the client gives up
	HangAfter          // the same, after it took effect
	DropBefore         // the connection is reset
	DropAfter          // the same, after it took effect
	AccessDenied       // refused: not authorized
	Malformed          // takes effect; the answer is not XML
	Contention         // refused: ResourceContention
	Invalid            // refused: ValidationError
)

// Faults lists every fault that passes, but None.
func Faults() []Fault {
	return []Fault{Throttle, ServerError, ErrorAfter, HangBefore, HangAfter, DropBefore, DropAfter, AccessDenied, Malformed, Contention}
}

func (f Fault) String() string {
	return [...]string{"none", "throttle", "server-error", "error-after", "hang-before", "hang-after", "drop-before", "drop-after", "access-denied", "malformed", "contention", "invalid"}[f]
}

// SetFault has every call ask f how it goes wrong; nil heals. f must not call
// the Cloud.
func (c *Cloud) SetFault(f func(Call) Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = f
}

// Count says how often an operation was called, or how often any was for "".
func (c *Cloud) Count(operation string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if operation != "" {
		return c.counts[operation]
	}
	n := 0
	for _, k := range c.counts {
		n += k
	}
	return n
}

// Counts returns how often each operation was called.
func (c *Cloud) Counts() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := map[string]int{}
	for k, n := range c.counts {
		out[k] = n
	}
	return out
}

// ResetCounts forgets the calls so far.
func (c *Cloud) ResetCounts() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts, c.calls = map[string]int{}, nil
}

// Calls returns the calls of an operation, in order.
func (c *Cloud) Calls(operation string) []Call {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(c.calls), func(k Call) bool { return k.Operation != operation })
}

// failure is an error answer.
type failure struct {
	status        int
	code, message string
}

func (f *failure) Error() string { return f.code + ": " + f.message }

func invalid(format string, args ...any) error {
	return &failure{http.StatusBadRequest, "ValidationError", fmt.Sprintf(format, args...)}
}

// ServeHTTP answers one call. A dropped connection panics with
// http.ErrAbortHandler, which net/http turns into a reset.
func (c *Cloud) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.serve(w, r, func() { panic(http.ErrAbortHandler) })
}

// Transport serves calls without a network, so that they take no time that is
// not the cloud's own.
func (c *Cloud) Transport() http.RoundTripper { return transport{c} }

type transport struct{ cloud *Cloud }

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	if r.Body == nil {
		r = r.Clone(r.Context())
		r.Body = http.NoBody
	}
	dropped := false
	t.cloud.serve(w, r, func() { dropped = true })
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	if dropped {
		return nil, fmt.Errorf("reading the answer: %w", syscall.ECONNRESET)
	}
	answer := w.Result()
	answer.Request = r
	return answer, nil
}

func (c *Cloud) serve(w http.ResponseWriter, r *http.Request, drop func()) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		drop()
		return
	}
	call, autoscaling := Call{}, false
	if cluster, name, ok := eksPath(r.URL.Path); ok {
		call = Call{Operation: "DescribeNodegroup", Form: url.Values{"cluster": {cluster}, "name": {name}}}
	} else {
		form, err := url.ParseQuery(string(body))
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		autoscaling = form.Get("Version") == "2011-01-01"
		call = Call{Operation: form.Get("Action"), Group: form.Get("AutoScalingGroupName"), Form: form}
		call.Instances = append(list(form, "InstanceIds.member"), list(form, "InstanceId")...)
		if id := form.Get("InstanceId"); id != "" {
			call.Instances = append(call.Instances, id)
		}
	}
	kind := c.count(&call)
	switch kind {
	case HangBefore:
		<-r.Context().Done()
		return
	case DropBefore:
		drop()
		return
	case Throttle:
		c.refuse(w, call, autoscaling, &failure{http.StatusBadRequest, "Throttling", "Rate exceeded"})
		return
	case ServerError:
		c.refuse(w, call, autoscaling, &failure{http.StatusServiceUnavailable, "ServiceUnavailable", "try again"})
		return
	case Invalid:
		c.refuse(w, call, autoscaling, invalid("the request is not valid"))
		return
	case Contention:
		c.refuse(w, call, autoscaling, &failure{http.StatusInternalServerError, "ResourceContention", "You already have a pending update to this resource"})
		return
	case AccessDenied:
		code := "UnauthorizedOperation"
		if autoscaling || call.Operation == "DescribeNodegroup" {
			code = "AccessDenied"
		}
		c.refuse(w, call, autoscaling, &failure{http.StatusForbidden, code, "User is not authorized to perform: " + call.Operation})
		return
	}
	answer, err := c.do(call, autoscaling)
	switch kind {
	case HangAfter:
		<-r.Context().Done()
		return
	case DropAfter:
		drop()
		return
	case ErrorAfter:
		c.refuse(w, call, autoscaling, &failure{http.StatusInternalServerError, "InternalFailure", "an internal error has occurred"})
		return
	case Malformed:
		_, _ = io.WriteString(w, "<html><body>proxy says no")
		return
	}
	if err != nil {
		c.refuse(w, call, autoscaling, err)
		return
	}
	if call.Operation == "DescribeNodegroup" {
		w.Header().Set("Content-Type", "application/json")
	} else {
		w.Header().Set("Content-Type", "text/xml")
	}
	_, _ = w.Write(answer)
}

func (c *Cloud) count(call *Call) Fault {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counts[call.Operation]++
	call.N = c.counts[call.Operation]
	const most = 10000
	if len(c.calls) < most {
		c.calls = append(c.calls, *call)
	}
	if c.fault == nil {
		return None
	}
	return c.fault(*call)
}

func (c *Cloud) refuse(w http.ResponseWriter, call Call, autoscaling bool, err error) {
	var f *failure
	if !errors.As(err, &f) {
		f = &failure{http.StatusInternalServerError, "InternalFailure", err.Error()}
	}
	switch {
	case call.Operation == "DescribeNodegroup":
		w.Header().Set("X-Amzn-Errortype", f.code)
		w.WriteHeader(f.status)
		fmt.Fprintf(w, `{"message":%q}`, f.message)
	case autoscaling:
		w.WriteHeader(f.status)
		fmt.Fprintf(w, "<ErrorResponse><Error><Type>Sender</Type><Code>%s</Code><Message>%s</Message></Error><RequestId>r</RequestId></ErrorResponse>", f.code, escape(f.message))
	default:
		w.WriteHeader(f.status)
		fmt.Fprintf(w, "<Response><Errors><Error><Code>%s</Code><Message>%s</Message></Error></Errors><RequestID>r</RequestID></Response>", f.code, escape(f.message))
	}
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}

// do carries out a call and returns the body of its answer.
func (c *Cloud) do(call Call, autoscaling bool) ([]byte, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if call.Operation == "DescribeNodegroup" {
		return c.describeNodegroup(call.Form.Get("cluster"), call.Form.Get("name"))
	}
	var result any
	var err error
	if autoscaling {
		result, err = c.autoscaling(call)
	} else {
		result, err = c.ec2(call)
	}
	if err != nil {
		return nil, err
	}
	inner, err := xml.Marshal(result)
	if err != nil {
		return nil, err
	}
	op := call.Operation
	if autoscaling {
		return fmt.Appendf(nil, "<%sResponse>%s<ResponseMetadata><RequestId>r</RequestId></ResponseMetadata></%sResponse>", op, inner, op), nil
	}
	return fmt.Appendf(nil, "<%sResponse><requestId>r</requestId>%s</%sResponse>", op, inner, op), nil
}

// list reads the members of a list: prefix.1, prefix.2, ….
func list(form url.Values, prefix string) (out []string) {
	for n := 1; ; n++ {
		v, ok := form[prefix+"."+strconv.Itoa(n)]
		if !ok {
			return out
		}
		out = append(out, v[0])
	}
}

// page cuts a page out of items; token is where it begins.
func page[T any](items []T, token string, most, bound int) ([]T, string, error) {
	from := 0
	if token != "" {
		var err error
		if from, err = strconv.Atoi(token); err != nil || from > len(items) {
			return nil, "", &failure{http.StatusBadRequest, "InvalidNextToken", "the token is not valid"}
		}
	}
	if most <= 0 {
		most = 50
	}
	to := min(from+min(most, bound), len(items))
	next := ""
	if to < len(items) {
		next = strconv.Itoa(to)
	}
	return items[from:to], next, nil
}
