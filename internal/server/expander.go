package server

import (
	"context"

	"github.com/hearth-ci/hearth/pkg/model"
	pb "github.com/hearth-ci/hearth/protos/expander"
)

// expanderServer implements CA's Expander service.
type expanderServer struct {
	pb.UnimplementedExpanderServer
	reader Reader
	ranker Ranker
}

// BestOptions keeps the options of the groups that the ranker names. To CA an
// error filters nothing, but an empty answer everything; so if nothing is left
// all options stay. It matches the answer by group id alone: no pods go back.
func (e *expanderServer) BestOptions(_ context.Context, req *pb.BestOptionsRequest) (*pb.BestOptionsResponse, error) {
	if e.reader.View() == nil {
		return nil, errNotSynced
	}
	if len(req.GetOptions()) == 0 {
		return nil, invalid("", "options", "at least one option is required")
	}
	offered := make([]ExpanderOption, 0, len(req.GetOptions()))
	for _, o := range req.GetOptions() {
		offered = append(offered, ExpanderOption{
			Group:     model.GroupID(o.GetNodeGroupId()),
			NodeCount: int(o.GetNodeCount()),
			Debug:     o.GetDebug(),
			pods:      o.Pods(),
		})
	}
	best := map[string]bool{}
	for _, id := range e.ranker.BestOptions(offered) {
		best[string(id)] = true
	}
	kept, all := &pb.BestOptionsResponse{}, &pb.BestOptionsResponse{}
	for _, o := range req.GetOptions() {
		answer := &pb.Option{NodeGroupId: o.GetNodeGroupId(), NodeCount: o.GetNodeCount(), Debug: o.GetDebug()}
		all.Options = append(all.Options, answer)
		if best[o.GetNodeGroupId()] {
			kept.Options = append(kept.Options, answer)
		}
	}
	if len(kept.Options) == 0 {
		return all, nil
	}
	return kept, nil
}
