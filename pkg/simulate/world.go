package simulate

import (
	"fmt"
	"math"
	"time"
)

// World is what is true for every policy alike: times, prices, and what an
// engine's cache holds.
type World struct {
	// Boot is how long a launched node takes until it runs jobs, with an empty
	// cache; Resume how long a parked one takes, with its cache intact.
	Boot, Resume time.Duration
	// PodLag is how long after it was queued a job has a pod, and may run. Only
	// policies that hear of queued jobs know of it before.
	PodLag time.Duration
	// ReleaseLag is how long a released node, parked or gone, still costs its
	// running price and can run nothing: drain, clean stop of the engine, stop
	// of the instance.
	ReleaseLag time.Duration
	// Price of a running node, booting and resuming included, and ParkedPrice
	// of a parked one, in dollars an hour.
	Price, ParkedPrice float64
	// Slots is how many jobs a node runs at once.
	Slots int
	// ColdFactor is what a cold cache adds to a job: it takes (1 + ColdFactor)
	// times its Duration.
	ColdFactor float64
	// KeysHeld and WarmFor say when an engine is warm for a key: the key is
	// among the KeysHeld it used most recently, and it was used within
	// WarmFor.
	KeysHeld int
	WarmFor  time.Duration
	// DelayPrice is what an hour of a job's waiting, or of its being slowed by
	// a cold cache, costs, in dollars.
	DelayPrice float64
	// MaxNodes bounds the nodes that are neither parked nor gone; 0 means no
	// bound.
	MaxNodes int
}

// DefaultWorld is an 8-core spot instance with a 100 GB disk in round figures,
// and a developer's time.
func DefaultWorld() World {
	return World{
		Boot: 120 * time.Second, Resume: 45 * time.Second, ReleaseLag: 20 * time.Second,
		Price: 0.40, ParkedPrice: 0.012,
		Slots: 1, ColdFactor: 0.6, KeysHeld: 20, WarmFor: 72 * time.Hour,
		DelayPrice: 30,
	}
}

// Cold is how long a job of that warm duration runs with a cold cache, in whole
// seconds.
func (w World) Cold(duration int64) int64 {
	return duration + int64(math.Round(w.ColdFactor*float64(duration)))
}

// Validate names the first value that makes no world.
func (w World) Validate() error {
	for _, d := range []struct {
		name  string
		value time.Duration
	}{{"boot", w.Boot}, {"resume", w.Resume}, {"pod lag", w.PodLag}, {"release lag", w.ReleaseLag}, {"warm-for", w.WarmFor}} {
		if d.value < 0 || d.value%time.Second != 0 || d.value > 365*24*time.Hour {
			return fmt.Errorf("%s is %s, want whole seconds from 0 to 365 days", d.name, d.value)
		}
	}
	for _, f := range []struct {
		name  string
		value float64
	}{{"price", w.Price}, {"parked price", w.ParkedPrice}, {"cold factor", w.ColdFactor}, {"delay price", w.DelayPrice}} {
		if f.value < 0 || f.value > 1e6 || math.IsNaN(f.value) {
			return fmt.Errorf("%s is %v, want 0 to 1e6", f.name, f.value)
		}
	}
	if w.Slots < 1 || w.KeysHeld < 0 || w.MaxNodes < 0 {
		return fmt.Errorf("slots %d, keys held %d, most nodes %d: want at least 1, 0 and 0", w.Slots, w.KeysHeld, w.MaxNodes)
	}
	return nil
}

func seconds(d time.Duration) int64 { return int64(d / time.Second) }
