package dagger

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

const idle = "# HELP dagger_connected_clients Number of currently connected clients\n" +
	"# TYPE dagger_connected_clients gauge\n" +
	"dagger_connected_clients 0\n" +
	"# TYPE dagger_local_cache_total_disk_size_bytes gauge\n" +
	"dagger_local_cache_total_disk_size_bytes 4.28e+11\n"

func TestParseRealEngines(t *testing.T) {
	for file, want := range map[string]struct {
		clients int
		bytes   int64
	}{
		"dagger-engine-0.19.11-idle.txt": {0, 0},
		"dagger-engine-0.19.11-busy.txt": {1, 405504},
		"dagger-engine-0.21.8-idle.txt":  {0, 0},
		"dagger-engine-0.21.8-busy.txt":  {1, 20480},
	} {
		t.Run(file, func(t *testing.T) {
			text, err := os.Open(filepath.Join("testdata", file))
			if err != nil {
				t.Fatal(err)
			}
			defer text.Close()
			clients, bytes, err := Parse(text)
			if err != nil || clients != want.clients || bytes != want.bytes {
				t.Errorf("%d clients, %d bytes, %v; want %+v", clients, bytes, err, want)
			}
		})
	}
}

func TestParse(t *testing.T) {
	const one = "dagger_connected_clients 1\n"
	for _, tt := range []struct {
		name, text string
		clients    int
		bytes      int64
		wrong      string // the error, when there is one
	}{
		{"both", idle, 0, 428e9, ""},
		{"no bytes", one, 1, -1, ""},
		{"spaces, a time, a carriage return", "\n \t dagger_connected_clients\t 3  1700000000000\r\n", 3, -1, ""},
		{"longer names", one + "dagger_connected_clients_total 7\ndagger_connected_clients:rate 8\n", 1, -1, ""},
		{"quoted names", one + "{\"a.b\"} 7\n", 1, -1, ""},

		{"nothing", "", 0, 0, "no dagger_connected_clients among the metrics"},
		{"without the names", "go_goroutines 50\n", 0, 0, "no dagger_connected_clients among the metrics"},
		{"bytes alone", "dagger_local_cache_total_disk_size_bytes 1\n", 0, 0, "no dagger_connected_clients among the metrics"},
		{"HTML", "<!DOCTYPE html>\n<html><body>dagger_connected_clients 1</body></html>\n", 0, 0, `line 1 is not Prometheus text: "<!DOCTYPE html>\n"`},
		{"HTML on one long line", "<html>" + strings.Repeat("x", maxLine), 0, 0, `line 1 is not Prometheus text: "<html>` + strings.Repeat("x", 34) + `"`},
		{"binary", one + "\x1f\x8b\x08\n", 0, 0, `line 2 is not Prometheus text: "\x1f\x8b\b\n"`},
		{"truncated in a number", "dagger_connected_clients 1\ndagger_local_cache_total_disk_size_bytes 428", 0, 0, "line 2 is cut off"},
		{"truncated in a comment", one + "# HEL", 0, 0, "line 2 is cut off"},
		{"huge", one + strings.Repeat("go_goroutines 50\n", maxBody/10), 0, 0, "more than 1048576 bytes of metrics"},
		{"a long line", one + "a" + strings.Repeat("b", maxLine) + " 1\n", 0, 0, "line 2 is longer than 4096 bytes"},
		{"twice", one + one, 0, 0, "line 2: dagger_connected_clients is there twice"},
		{"with labels", "dagger_connected_clients{engine=\"a\"} 1\n", 0, 0, "line 1: dagger_connected_clients is not a name and a value"},
		{"no value", "dagger_connected_clients\n", 0, 0, "line 1: dagger_connected_clients is not a name and a value"},
		{"blank value", "dagger_connected_clients  \n", 0, 0, "line 1: dagger_connected_clients is not a name and a value"},
		{"too many values", "dagger_connected_clients 1 2 3\n", 0, 0, "line 1: dagger_connected_clients is not a name and a value"},
		{"not a number", "dagger_connected_clients one\n", 0, 0, `line 1: dagger_connected_clients is "one"`},
		{"out of range", "dagger_connected_clients 1e999\n", 0, 0, `line 1: dagger_connected_clients is "1e999"`},
		{"NaN", "dagger_connected_clients NaN\n", 0, 0, "dagger_connected_clients is NaN"},
		{"infinite", one + "dagger_local_cache_total_disk_size_bytes +Inf\n", 0, 0, "dagger_local_cache_total_disk_size_bytes is +Inf"},
		{"negative clients", "dagger_connected_clients -1\n", 0, 0, "dagger_connected_clients is -1"},
		{"negative bytes", one + "dagger_local_cache_total_disk_size_bytes -1\n", 0, 0, "dagger_local_cache_total_disk_size_bytes is -1"},
		{"NaN bytes", one + "dagger_local_cache_total_disk_size_bytes NaN\n", 0, 0, "dagger_local_cache_total_disk_size_bytes is NaN"},
		{"half a client", "dagger_connected_clients 0.5\n", 0, 0, "dagger_connected_clients is 0.5"},
		{"too many clients", "dagger_connected_clients 1e9\n", 0, 0, "dagger_connected_clients is 1e+09"},
		{"too many bytes", one + "dagger_local_cache_total_disk_size_bytes 9e18\n", 0, 0, "dagger_local_cache_total_disk_size_bytes is 9e+18"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			clients, bytes, err := Parse(strings.NewReader(tt.text))
			if tt.wrong != "" {
				if err == nil || err.Error() != tt.wrong {
					t.Errorf("error %v; want %s", err, tt.wrong)
				}
			} else if err != nil || clients != tt.clients || bytes != tt.bytes {
				t.Errorf("%d clients, %d bytes, %v; want %d, %d", clients, bytes, err, tt.clients, tt.bytes)
			}
		})
	}
	t.Run("broken off", func(t *testing.T) {
		text := io.MultiReader(strings.NewReader(idle), iotest.ErrReader(io.ErrUnexpectedEOF))
		if _, _, err := Parse(text); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("error %v; want %v", err, io.ErrUnexpectedEOF)
		}
	})
}

// TestParseBounded: text without end is not read to its end.
func TestParseBounded(t *testing.T) {
	for name, line := range map[string]string{"lines": "go_goroutines 50\n", "one line": "a"} {
		t.Run(name, func(t *testing.T) {
			read := &counting{from: endless(line)}
			if _, _, err := Parse(read); err == nil {
				t.Error("believed")
			}
			if read.bytes > maxBody+1 {
				t.Errorf("read %d bytes; want %d at most", read.bytes, maxBody+1)
			}
		})
	}
}

type endless string

func (e endless) Read(p []byte) (int, error) {
	n := 0
	for len(p)-n >= len(e) {
		n += copy(p[n:], e)
	}
	return n, nil
}

type counting struct {
	from  io.Reader
	bytes int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.from.Read(p)
	c.bytes += n
	return n, err
}

// FuzzParse: whatever the text is, it is refused or says something that an
// engine can be, the same however it arrives, and never when its end is missing.
func FuzzParse(f *testing.F) {
	f.Add(idle)
	f.Add("dagger_connected_clients 1\ndagger_dagql_cache_entries 4328\ndagger_local_cache_total_disk_size_bytes 20480\n")
	f.Add("go_gc_duration_seconds{quantile=\"0.25\"} 8.6329e-05\ndagger_connected_clients 2 1700000000000\r\n")
	f.Add("<html>dagger_connected_clients 1</html>\n")
	f.Add("dagger_connected_clients NaN\n")
	f.Add("dagger_connected_clients 0x1p-2\ndagger_local_cache_total_disk_size_bytes -0\n")
	f.Fuzz(func(t *testing.T, text string) {
		clients, bytes, err := Parse(strings.NewReader(text))
		if again, bytes2, err2 := Parse(iotest.OneByteReader(strings.NewReader(text))); again != clients || bytes2 != bytes || (err == nil) != (err2 == nil) {
			t.Fatalf("%d, %d, %v byte by byte; %d, %d, %v at once", again, bytes2, err2, clients, bytes, err)
		}
		if err != nil {
			if len(err.Error()) > 300 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			return
		}
		if clients < 0 || clients > maxClients || bytes < -1 || bytes > maxBytes {
			t.Errorf("%d clients, %d bytes", clients, bytes)
		}
		if _, _, err := Parse(strings.NewReader(strings.TrimSuffix(text, "\n") + "x")); err == nil {
			t.Error("believed without its end")
		}
	})
}
