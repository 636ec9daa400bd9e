package placement

import (
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"

	"github.com/hearth-ci/hearth/pkg/model"
)

// maxBody bounds a request: what the API server takes as an object (etcd holds
// 1.5 MiB, and a request repeats nothing).
const maxBody = 3 << 20

// HandlerConfig is what a Handler needs. All fields are required.
type HandlerConfig struct {
	Index *Index
	// Read returns what the watches would make of a pod.
	Read  func(*corev1.Pod) model.Pod
	Label func(model.CacheKey) string
	// Requests counts answers by result: placed, late, says, foreign, bad.
	Requests *prometheus.CounterVec
	Logger   *slog.Logger
}

// Handler answers `POST /placement` with the AdmissionReview of a pod. It
// allows every pod. It answers from memory, and is safe for concurrent use.
type Handler struct{ cfg HandlerConfig }

// NewHandler returns a handler.
func NewHandler(cfg HandlerConfig) (*Handler, error) {
	if cfg.Index == nil || cfg.Read == nil || cfg.Label == nil || cfg.Requests == nil || cfg.Logger == nil {
		return nil, errors.New("making the placement webhook: a field of its configuration is missing")
	}
	return &Handler{cfg}, nil
}

// ServeHTTP implements http.Handler. What is no review is refused with 400: the
// API server then creates the pod as it is.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		h.refuse(w, "reading the request", err)
		return
	}
	var review admissionv1.AdmissionReview
	if err := utiljson.Unmarshal(body, &review); err != nil {
		h.refuse(w, "reading the review", err)
		return
	}
	if review.Request == nil || review.Request.UID == "" {
		h.refuse(w, "reading the review", errors.New("it has no request with a uid"))
		return
	}
	answer := h.review(review.Request)
	answer.UID, answer.Allowed = review.Request.UID, true
	review.Request, review.Response = nil, answer
	text, err := json.Marshal(review)
	if err != nil { // cannot be: it holds what was read and texts of ours
		h.refuse(w, "writing the answer", err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text)
}

func (h *Handler) refuse(w http.ResponseWriter, doing string, err error) {
	h.count("bad")
	h.cfg.Logger.Warn("placement: a request cannot be used", "doing", doing, "err", err)
	http.Error(w, doing+": "+err.Error(), http.StatusBadRequest)
}

func (h *Handler) count(result string) { h.cfg.Requests.WithLabelValues(result).Inc() }

// review decides about one pod.
func (h *Handler) review(r *admissionv1.AdmissionRequest) *admissionv1.AdmissionResponse {
	if r.Operation != admissionv1.Create || r.Resource.Group != "" || r.Resource.Resource != "pods" || r.SubResource != "" {
		h.count("foreign")
		return &admissionv1.AdmissionResponse{}
	}
	var pod facts
	if err := utiljson.Unmarshal(r.Object.Raw, &pod); err != nil {
		h.count("bad")
		return &admissionv1.AdmissionResponse{Warnings: []string{"hearth placement: the pod cannot be read: " + clip(err.Error())}}
	}
	patch, result := h.patch(&pod, r.Namespace)
	h.count(result)
	if len(patch) == 0 {
		return &admissionv1.AdmissionResponse{}
	}
	text, err := json.Marshal(patch)
	if err != nil { // cannot be: it is made of texts and numbers
		return &admissionv1.AdmissionResponse{Warnings: []string{"hearth placement: " + clip(err.Error())}}
	}
	kind := admissionv1.PatchTypeJSONPatch
	return &admissionv1.AdmissionResponse{Patch: text, PatchType: &kind}
}

// patch says what to change of a pod and, in a word, why. A pod that it has
// changed is not changed again.
func (h *Handler) patch(f *facts, namespace string) (patch []operation, result string) {
	pod := h.cfg.Read(f.pod(namespace))
	if pod.Kind != model.PodRunner || pod.Key == "" {
		return nil, "foreign"
	}
	notes := map[string]string{safeToEvict: "false"}
	if _, decided := f.Annotations[annotationPlacement]; decided || f.says() {
		return f.annotate(nil, notes), "says"
	}
	label := h.cfg.Label(pod.Key)
	choice := h.cfg.Index.choose(label, pod.Group)
	notes[annotationPlacement] = choice.words()
	patch = f.annotate(nil, notes)
	if choice.late {
		return patch, "late"
	}
	return f.prefer(patch, choice.terms(label)), "placed"
}

func clip(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most]
	}
	return s
}
