package main

import (
	"reflect"
	"strings"
	"testing"
)

const list = `package pricing

// generated at 2026-07-20T13:44:30Z for us-east-1

var Prices = map[string]map[ec2types.InstanceType]float64{
	"us-east-1": {
		"c5.large": 0.085000, "c5.metal": 4.080000,
	},
	"us-east-2": {"c5.large": 0.09},
}
`

func TestRead(t *testing.T) {
	date, prices, err := read([]byte(list))
	want := map[string]map[string]float64{"us-east-1": {"c5.large": 0.085, "c5.metal": 4.08}, "us-east-2": {"c5.large": 0.09}}
	if err != nil || date != "2026-07-20" || !reflect.DeepEqual(prices, want) {
		t.Errorf("as of %s %v, %v; want %v", date, prices, err, want)
	}
	for what, bad := range map[string]string{
		"no date":         strings.Replace(list, "generated", "made", 1),
		"no price":        strings.Replace(list, "0.085000", "cheap", 1),
		"nothing to pay":  strings.Replace(list, "0.085000", "0", 1),
		"no type":         strings.Replace(list, `"c5.large"`, `"c5"`, 1),
		"prices directly": strings.Replace(list, `{"c5.large": 0.09}`, "0.09", 1),
		"nothing":         list[:strings.Index(list, "var")],
	} {
		if _, got, err := read([]byte(bad)); err == nil {
			t.Errorf("%s: read as %v", what, got)
		}
	}
}
