package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hearth-ci/hearth/pkg/model"
	"github.com/hearth-ci/hearth/pkg/scoring"
)

// TestWorkedExample holds the example in docs/policy.md to the policy.
func TestWorkedExample(t *testing.T) {
	now := time.Date(2026, 1, 5, 10, 0, 0, 0, time.UTC)
	api, web := scoring.KeyOf("api"), scoring.KeyOf("web")
	ago := func(key scoring.Key, h int) scoring.Use {
		return scoring.Use{Key: key, Last: now.Add(-time.Duration(h) * time.Hour), Count: 1}
	}
	costs := scoring.Costs{
		Running: 0.40, Parked: 0.012, TimeValue: 30,
		Boot: 120 * time.Second, Resume: 45 * time.Second, ColdPenalty: 3 * time.Minute,
	}
	nodes := func(parked bool, unused time.Duration) []scoring.Node {
		return []scoring.Node{
			{Instance: "A", Parked: parked, IdleSince: now.Add(-unused), Uses: []scoring.Use{ago(api, 1)}},
			{Instance: "B", Parked: parked, IdleSince: now.Add(-unused), Uses: []scoring.Use{ago(web, 20), ago(api, 24)}},
			{Instance: "C", Parked: parked, IdleSince: now.Add(-unused), Uses: []scoring.Use{ago(web, 1)}},
		}
	}
	keys := scoring.NewKeys(costs.ColdPenalty)
	for name, jobs := range map[string]int{"api": 6, "web": 3, "other": 1} {
		for range jobs {
			keys.Arrived(scoring.KeyOf(model.CacheKey(name)), now)
		}
	}
	decide := func(parked bool, unused time.Duration, learnt *scoring.Memory) []model.Verdict {
		verdicts := scoring.Decide(scoring.Request{
			Nodes: nodes(parked, unused), Costs: costs, Memory: learnt, Now: now,
			Bounds: scoring.Bounds{MaxWarm: 10, Park: true},
		}).Verdicts
		slices.Reverse(verdicts) // the most valuable first
		return verdicts
	}
	memory := func() *scoring.Memory {
		m := scoring.NewMemory(costs)
		m.Keys = keys
		return m
	}

	t.Run("marginal value", func(t *testing.T) {
		var order strings.Builder
		var scores []int
		for _, v := range decide(false, time.Second, memory()) {
			order.WriteString(string(v.Instance))
			scores = append(scores, int(v.Score+0.5))
		}
		if order.String() != "ACB" || !slices.Equal(scores, []int{26, 13, 11}) {
			t.Errorf("order %s, seconds %v; the page says A, C, B: 26, 13, 11", order.String(), scores)
		}
	})

	t.Run("bounds", func(t *testing.T) {
		for _, test := range []struct {
			parked bool
			unused time.Duration
			keeps  bool
		}{
			{false, 19*time.Minute + 19*time.Second, true},
			{false, 19*time.Minute + 21*time.Second, false},
			{true, 59 * time.Hour, true},
			{true, 59*time.Hour + 3*time.Minute, false},
		} {
			for _, v := range decide(test.parked, test.unused, memory()) {
				if keeps := v.Decision == model.DecisionKeep; keeps != test.keeps {
					t.Errorf("%s, parked %v, unused for %s: %s %v", v.Instance, test.parked, test.unused, v.Decision, v.Reasons)
				}
			}
		}
	})

	t.Run("ledger", func(t *testing.T) {
		// A day in which 20 nodes were busy for a moment, 5 of them all the time,
		// 30 idle hours were paid, and 60 of 100 jobs waited.
		m := memory()
		m.Ledger.Nodes(20, 0, now.Add(-24*time.Hour))
		m.Ledger.Nodes(5, 15, now.Add(-24*time.Hour))
		m.Ledger.Nodes(5, 0, now.Add(-22*time.Hour))
		m.Ledger.Nodes(5, 0, now)
		for i := range 100 {
			m.Ledger.Job(i < 60)
		}
		for unused, want := range map[time.Duration]model.Decision{
			64 * time.Second: model.DecisionKeep,
			65 * time.Second: model.DecisionPark,
		} {
			for _, v := range decide(false, unused, m) {
				if v.Decision != want {
					t.Errorf("%s, idle for %s: %s %v", v.Instance, unused, v.Decision, v.Reasons)
				}
			}
		}
	})

	t.Run("who takes a job of web", func(t *testing.T) {
		all := nodes(true, time.Hour)
		stock := scoring.NewStock(all, now)
		if missed := stock.Missed(all[1], web, keys, now); missed < 26.5 || missed > 27.5 {
			t.Errorf("B is missed for %.1f s, the page says 27", missed)
		}
		if missed := stock.Missed(all[2], web, keys, now); missed != 0 {
			t.Errorf("C is missed for %.1f s, the page says nothing", missed)
		}
		first, _ := scoring.RankParked(all, map[scoring.Key]int{web: 1}, 1, 1, keys, now)
		if diff := cmp.Diff(model.InstanceID("C"), first[0]); diff != "" {
			t.Error(diff)
		}
	})
}
