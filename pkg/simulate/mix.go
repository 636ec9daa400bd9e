package simulate

import (
	"cmp"
	"slices"

	"github.com/hearth-ci/hearth/pkg/model"
)

// Mix overlays traces. Each is moved by whole weeks, so that the hours of its
// week stay what they were, to begin in the week in which the first does. Ids,
// keys and groups are kept apart by the traces' names.
func Mix(name string, traces ...Trace) Trace {
	mixed := Trace{Name: name}
	for i, t := range traces {
		mixed.Rows += t.Rows
		for _, r := range t.Rejected {
			r.Reason = t.Name + ": " + r.Reason
			mixed.Rejected = append(mixed.Rejected, r)
		}
		if len(t.Jobs) == 0 {
			continue
		}
		shift := int64(0)
		if first := traces[0].Jobs; i > 0 && len(first) > 0 {
			shift = weekOf(first[0].Arrival) - weekOf(t.Jobs[0].Arrival)
		}
		for _, j := range t.Jobs {
			j.ID = t.Name + "/" + j.ID
			j.Key = model.CacheKey(t.Name+"/") + j.Key
			j.Group = t.Name + "/" + j.Group
			j.Arrival += shift
			mixed.Jobs = append(mixed.Jobs, j)
		}
	}
	mixed.Sort()
	slices.SortStableFunc(mixed.Rejected, func(a, b Rejection) int { return cmp.Compare(a.Line, b.Line) })
	return mixed
}

// weekOf returns when the week of t began: on Monday at midnight, UTC.
func weekOf(t int64) int64 {
	weekday, second := dayOf(t)
	return t - second - (weekday+6)%7*24*hour
}
