package ui_test

import (
	"math"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestContrast: text and cells stand out in both themes as WCAG 2.2 AA asks:
// 4.5 to 1 for text, 3 to 1 for what is not text.
func TestContrast(t *testing.T) {
	css, err := os.ReadFile("assets/ui.css")
	if err != nil {
		t.Fatal(err)
	}
	colour := regexp.MustCompile(`--([a-z]+): (#[0-9a-f]{3,6});`)
	themes := 0
	for block := range strings.SplitSeq(string(css), "}") {
		if !strings.Contains(block, "--bg:") {
			continue
		}
		themes++
		of := map[string]float64{}
		for _, m := range colour.FindAllStringSubmatch(block, -1) {
			of[m[1]] = luminance(t, m[2])
		}
		for name, least := range map[string]float64{
			"text": 4.5, "dim": 4.5, "link": 4.5, "warn": 4.5, "busy": 3, "idle": 3, "starting": 3, "leaving": 3, "notready": 3, "parked": 3,
		} {
			for _, ground := range []string{"bg", "panel"} {
				a, b := of[name], of[ground]
				if ratio := (max(a, b) + 0.05) / (min(a, b) + 0.05); ratio < least || a == 0 {
					t.Errorf("theme %d: %s on %s has a contrast of %.2f, want %g", themes, name, ground, ratio, least)
				}
			}
		}
	}
	if themes != 3 { // light, dark by choice, dark by the system
		t.Errorf("%d themes", themes)
	}
}

// luminance is WCAG's relative luminance.
func luminance(t *testing.T, hex string) float64 {
	t.Helper()
	if hex = hex[1:]; len(hex) == 3 {
		hex = string([]byte{hex[0], hex[0], hex[1], hex[1], hex[2], hex[2]})
	}
	n, err := strconv.ParseUint(hex, 16, 32)
	if err != nil {
		t.Fatal(err)
	}
	linear := func(shift int) float64 {
		c := float64(n>>shift&0xff) / 255
		if c <= 0.04045 {
			return c / 12.92
		}
		return math.Pow((c+0.055)/1.055, 2.4)
	}
	return 0.2126*linear(16) + 0.7152*linear(8) + 0.0722*linear(0)
}
