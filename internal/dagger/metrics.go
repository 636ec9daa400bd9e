package dagger

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// The metrics that are read, as engines v0.18.19 and later name them. Both are
// gauges without labels. The clients are counted when they are asked for; the
// bytes every five minutes, and they read 0 from the engine's start until they
// have been counted for the first time.
const (
	metricClients    = "dagger_connected_clients"
	metricCacheBytes = "dagger_local_cache_total_disk_size_bytes"
)

const (
	// maxBody bounds what is read of one engine. A real answer has 10 KB,
	// whatever the engine holds: none of its metrics has labels of its own.
	maxBody = 1 << 20
	// maxLine is 16 times the longest line of a real answer.
	maxLine = 4 << 10
	// maxClients and maxBytes bound what is believed.
	maxClients = 1 << 20
	maxBytes   = 1 << 60
)

// Parse reads what an engine answers to GET /metrics, in Prometheus' text format:
// the clients that are connected, and the size of the local cache in bytes, -1
// when the engine does not say.
//
// An error says why the text cannot be trusted: it is no such text, is huge or
// cut off, has no clients, or gives a metric twice, with labels, or with a value
// that it cannot have. Text that ends between two lines looks whole; what it
// lacks is not known then, rather than zero.
//
// This is a scanner of our own and not expfmt: that one builds every metric of
// the text in memory (for a real answer 27 times the time and 1,300 allocations
// instead of 9), has no bounds, and takes a metric that is there twice.
func Parse(text io.Reader) (clients int, cacheBytes int64, err error) {
	values, err := scan(text, metricClients, metricCacheBytes)
	if err != nil {
		return 0, 0, err
	}
	n, ok := values[metricClients]
	if !ok {
		return 0, 0, fmt.Errorf("no %s among the metrics", metricClients)
	}
	if err := believable(metricClients, n, maxClients); err != nil {
		return 0, 0, err
	}
	size, ok := values[metricCacheBytes]
	if !ok {
		size = -1
	} else if err := believable(metricCacheBytes, size, maxBytes); err != nil {
		return 0, 0, err
	}
	return int(n), int64(size), nil
}

func believable(name string, value, most float64) error {
	if !(value >= 0 && value <= most) || value != math.Trunc(value) { // NaN is neither
		return fmt.Errorf("%s is %v", name, value)
	}
	return nil
}

// scan returns the values of those names that the text has.
func scan(text io.Reader, names ...string) (map[string]float64, error) {
	limited := &io.LimitedReader{R: text, N: maxBody + 1}
	lines := bufio.NewReaderSize(limited, maxLine)
	values := make(map[string]float64, len(names))
	for number := 1; ; number++ {
		line, err := lines.ReadSlice('\n')
		line = bytes.TrimLeft(line, " \t")
		if len(line) > 0 && !startsLikeText(line[0]) {
			return nil, fmt.Errorf("line %d is not Prometheus text: %.40q", number, line)
		}
		switch {
		case err == nil:
		case errors.Is(err, bufio.ErrBufferFull):
			return nil, fmt.Errorf("line %d is longer than %d bytes", number, maxLine)
		case !errors.Is(err, io.EOF):
			return nil, fmt.Errorf("reading line %d: %w", number, err)
		case limited.N <= 0:
			return nil, fmt.Errorf("more than %d bytes of metrics", maxBody)
		case len(line) > 0:
			return nil, fmt.Errorf("line %d is cut off", number)
		default:
			return values, nil
		}
		i := slices.IndexFunc(names, func(name string) bool { return bytes.HasPrefix(line, []byte(name)) })
		if i < 0 {
			continue
		}
		name, rest := names[i], string(line[len(names[i]):])
		switch rest[0] { // the line has an end
		case ' ', '\t':
		case '{', '\n', '\r':
			return nil, fmt.Errorf("line %d: %s is not a name and a value", number, name)
		default: // of a longer name
			continue
		}
		if _, twice := values[name]; twice {
			return nil, fmt.Errorf("line %d: %s is there twice", number, name)
		}
		fields := strings.Fields(rest) // a value, and perhaps a time
		if len(fields) < 1 || len(fields) > 2 {
			return nil, fmt.Errorf("line %d: %s is not a name and a value", number, name)
		}
		value, err := strconv.ParseFloat(fields[0], 64)
		if err != nil {
			return nil, fmt.Errorf("line %d: %s is %.40q", number, name, fields[0])
		}
		values[name] = value
	}
}

// startsLikeText says whether a line of the format may begin so: with a name, a
// quoted name in braces, a comment, or its end.
func startsLikeText(b byte) bool {
	return 'a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || strings.IndexByte("_:{#\r\n", b) >= 0
}
