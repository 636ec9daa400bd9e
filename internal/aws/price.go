package aws

import (
	"strings"

	ec2types "github.com/aws/aws-sdk-go-v2/service/ec2/types"
)

// PricesAsOf is when the table below was put together by hand: On-Demand list
// prices of Linux in us-east-1 from https://aws.amazon.com/ec2/pricing/on-demand/.
// Other regions cost up to half as much again; the annotation node-price wins.
const PricesAsOf = "2025-01"

// listPrice is what an hour of an instance type costs, in dollars; false when
// it is not known.
func listPrice(instanceType string) (float64, bool) {
	family, size, ok := strings.Cut(instanceType, ".")
	if !ok {
		return 0, false
	}
	// Within a family the price is proportional to the size. Dollars an hour
	// for each large, that is two vCPUs.
	large, ok := map[string]float64{
		"m5": 0.096, "m5a": 0.086, "m5d": 0.113, "m6a": 0.0864, "m6i": 0.096, "m6id": 0.11865, "m6g": 0.077, "m6gd": 0.0904,
		"m7a": 0.11592, "m7g": 0.0816, "m7i": 0.1008,
		"c5": 0.085, "c5a": 0.077, "c5d": 0.096, "c6a": 0.0765, "c6i": 0.085, "c6id": 0.1008, "c6g": 0.068, "c6gd": 0.0768,
		"c7a": 0.10264, "c7g": 0.0725, "c7i": 0.08925,
		"r5": 0.126, "r5d": 0.144, "r6a": 0.1134, "r6i": 0.126, "r6g": 0.1008, "r7g": 0.1071, "r7i": 0.1323,
		"t3": 0.0832, "t3a": 0.0752, "t4g": 0.0672,
	}[family]
	factor, known := map[string]float64{
		"medium": 0.5, "large": 1, "xlarge": 2, "2xlarge": 4, "3xlarge": 6, "4xlarge": 8, "8xlarge": 16, "9xlarge": 18,
		"12xlarge": 24, "16xlarge": 32, "18xlarge": 36, "24xlarge": 48, "32xlarge": 64,
	}[size]
	return large * factor, ok && known
}

// estimate is what an hour of an instance type that has no list price costs, in
// dollars, from its CPUs and memory: the two rates are those that come within 3 %
// of m6i, c6i and r6i in the table above. False for types with GPUs or other
// accelerators, whose price is mostly that of these.
func estimate(info ec2types.InstanceTypeInfo) (float64, bool) {
	const perCPU, perGiB = 0.035, 0.0033
	if info.GpuInfo != nil && len(info.GpuInfo.Gpus) > 0 || info.InferenceAcceleratorInfo != nil || info.NeuronInfo != nil || info.FpgaInfo != nil || cpusOf(info) == 0 {
		return 0, false
	}
	return perCPU*float64(cpusOf(info)) + perGiB*float64(mibOf(info))/1024, true
}
