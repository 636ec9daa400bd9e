package aws

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	awssdk "github.com/aws/aws-sdk-go-v2/aws"
	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hearth-ci/hearth/pkg/model"
)

// What a node keeps for itself on EKS (user guide, "Reserve compute resources
// for pods"; the AMI's bootstrap): kube-reserved memory is 255 MiB and 11 MiB a
// pod, the hard eviction threshold 100 MiB; kube-reserved CPU 6 % of the first
// core, 1 % of the second, 0.5 % of the next two, 0.25 % of all others; 1 GiB of
// disk, of which 10 % are kept free. What hypervisor and kernel take of the
// memory is not documented: 7.5 % is what Karpenter assumes, so that a pod that
// is said to fit does.
const (
	reservedMiB       = 255
	reservedMiBPerPod = 11
	evictionMiB       = 100
	overheadPermille  = 75
)

// describeNode is a bare node of an instance type; a volume of 0 GiB is not
// known.
func describeNode(info ec2types.InstanceTypeInfo, volumeGiB int) model.Template {
	cpus, mib, arch := cpusOf(info), mibOf(info)*(1000-overheadPermille)/1000, "amd64"
	if p := info.ProcessorInfo; p != nil && slices.Contains(p.SupportedArchitectures, ec2types.ArchitectureTypeArm64) {
		arch = "arm64"
	}
	// One address of each interface is its own; two pods use the host's
	// (EKS user guide, "maximum number of pods").
	pods := 110
	if n := info.NetworkInfo; n != nil && awssdk.ToInt32(n.MaximumNetworkInterfaces) > 0 {
		pods = int(awssdk.ToInt32(n.MaximumNetworkInterfaces)*(awssdk.ToInt32(n.Ipv4AddressesPerInterface)-1) + 2)
	}
	t := model.Template{
		InstanceType: string(info.InstanceType),
		Labels:       map[string]string{"kubernetes.io/arch": arch, "kubernetes.io/os": "linux"},
		Capacity:     map[string]string{"cpu": fmt.Sprint(cpus), "memory": fmt.Sprintf("%dMi", mib), "pods": fmt.Sprint(pods)},
	}
	t.Allocatable = maps.Clone(t.Capacity)
	t.Allocatable["cpu"] = fmt.Sprintf("%dm", cpus*1000-reservedCPU(cpus))
	t.Allocatable["memory"] = fmt.Sprintf("%dMi", max(mib-reservedMiB-reservedMiBPerPod*pods-evictionMiB, 0))
	if volumeGiB > 0 {
		t.Capacity["ephemeral-storage"] = fmt.Sprintf("%dGi", volumeGiB)
		t.Allocatable["ephemeral-storage"] = fmt.Sprintf("%dMi", max(volumeGiB*1024*9/10-1024, 0))
	}
	if info.GpuInfo != nil {
		gpus := 0
		for _, g := range info.GpuInfo.Gpus {
			if strings.EqualFold(awssdk.ToString(g.Manufacturer), "NVIDIA") {
				gpus += int(awssdk.ToInt32(g.Count))
			}
		}
		if gpus > 0 {
			t.Capacity["nvidia.com/gpu"] = fmt.Sprint(gpus)
			t.Allocatable["nvidia.com/gpu"] = fmt.Sprint(gpus)
		}
	}
	return t
}

func cpusOf(info ec2types.InstanceTypeInfo) int {
	if info.VCpuInfo == nil {
		return 0
	}
	return int(awssdk.ToInt32(info.VCpuInfo.DefaultVCpus))
}

func mibOf(info ec2types.InstanceTypeInfo) int {
	if info.MemoryInfo == nil {
		return 0
	}
	return int(awssdk.ToInt64(info.MemoryInfo.SizeInMiB))
}

// reservedCPU is in thousandths of a core.
func reservedCPU(cpus int) int {
	quarters := 0 // of a thousandth of a core
	for core := range cpus {
		switch core {
		case 0:
			quarters += 240
		case 1:
			quarters += 40
		case 2, 3:
			quarters += 20
		default:
			quarters += 10
		}
	}
	return (quarters + 3) / 4
}

// volume is the size of the largest volume that a launch template asks for.
func volume(data ec2types.ResponseLaunchTemplateData) (gib int) {
	for _, d := range data.BlockDeviceMappings {
		if d.Ebs != nil {
			gib = max(gib, int(awssdk.ToInt32(d.Ebs.VolumeSize)))
		}
	}
	return gib
}

// applyTags lays what a group's tags say over its template. A tag that cannot
// be used is logged and left out.
func (b *Backend) applyTags(group model.GroupID, tags map[string]string, t *model.Template) {
	bad := func(key, want string) {
		b.cfg.Logger.Warn("tag cannot be used", "nodegroup", group, "tag", key, "value", tags[key], "want", want)
	}
	for _, key := range slices.Sorted(maps.Keys(tags)) {
		value := tags[key]
		if name, ok := strings.CutPrefix(key, labelTag); ok {
			if len(validation.IsQualifiedName(name)) > 0 || len(validation.IsValidLabelValue(value)) > 0 {
				bad(key, "a label")
				continue
			}
			t.Labels[name] = value
		}
		if name, ok := strings.CutPrefix(key, taintTag); ok {
			v, effect, _ := strings.Cut(value, ":")
			if len(validation.IsQualifiedName(name)) > 0 || len(validation.IsValidLabelValue(v)) > 0 ||
				!slices.Contains([]string{"NoSchedule", "PreferNoSchedule", "NoExecute"}, effect) {
				bad(key, "value:Effect")
				continue
			}
			t.Taints = slices.DeleteFunc(t.Taints, func(x model.Taint) bool { return x.Key == name && x.Effect == effect })
			t.Taints = append(t.Taints, model.Taint{Key: name, Value: v, Effect: effect})
		}
		if name, ok := strings.CutPrefix(key, resourceTag); ok {
			q, err := resource.ParseQuantity(value)
			if err != nil || q.Sign() < 0 || len(validation.IsQualifiedName(name)) > 0 {
				bad(key, "a quantity")
				continue
			}
			t.Capacity[name], t.Allocatable[name] = q.String(), q.String()
		}
	}
}
