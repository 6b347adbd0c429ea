"""What happens inside a model: the observation study (Section 3, Figs. 3-5), the router's view (Fig. 11), interventions."""
